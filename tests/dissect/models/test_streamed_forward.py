"""The forward of a model on disk: the whole model's logits, one stage in memory, and the proofs that rest on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dissect.models.model import load_model
from dissect.models.streamed_forward import weights_on_demand
from dissect.models.streamed_model import StreamedModel, empty_model, open_streamed
from tests.dissect.families import CONFIGURATIONS, build
from tests.dissect.streaming_helpers import edit, held, reader_threads, save
from tests.unlearning.helpers import build_tokenizer
from unlearning.checkpoints.load import load_weights
from unlearning.common.errors import InputError

IDS = torch.arange(3, 15).view(2, 6)


def saved(path: Path, name: str, **fields: Any) -> Path:
    """A configuration's random model with a tokenizer."""
    build_tokenizer().save_pretrained(path)
    return save(path, build(name, **fields))


@torch.no_grad()
def logits(hf: Any) -> Tensor:
    found: Tensor = hf(input_ids=IDS, use_cache=False).logits
    return found


def blocks_of(streamed: StreamedModel) -> str:
    depth = streamed.hf.config.num_hidden_layers
    return next(
        path for path, one in streamed.hf.named_modules() if isinstance(one, nn.ModuleList) and len(one) == depth
    )


@pytest.mark.parametrize("name", ["llama", "gpt-2", "gpt-oss", "opt, post-norm, projected", "falcon, alibi", "gemma 3"])
def test_a_forward_from_disk_is_the_forward_with_one_stage_in_memory(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    streamed = open_streamed(path, name="model")
    blocks, seen = blocks_of(streamed), []

    def act() -> None:
        layers = {key.removeprefix(f"{blocks}.").split(".")[0] for key in held(streamed) if key.startswith(blocks)}
        assert len(layers) <= 1
        seen.append("".join(layers) or "outside")

    with weights_on_demand(streamed, blocks=blocks, act=act):
        for _ in range(2):
            assert torch.equal(logits(streamed.hf), logits(load_weights(path)))
            assert held(streamed) == {}
    assert seen == ["outside", "0", "1", "2", "outside"] * 2


def test_what_is_written_into_the_weights_lasts_for_one_call(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama")
    streamed, whole = open_streamed(path, name="model"), load_weights(path)
    factor = 3.0

    def act() -> None:
        for key, tensor in held(streamed).items():
            if key.endswith("o_proj.weight"):
                tensor.data.mul_(factor)

    plain = logits(whole)
    for layer in whole.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(factor)
    with weights_on_demand(streamed, blocks="model.layers", act=act):
        assert torch.equal(logits(streamed.hf), logits(whole))
        factor = 1.0
        assert torch.equal(logits(streamed.hf), plain)


def test_nothing_stays_in_memory_after_an_error(tmp_path: Path) -> None:
    streamed = open_streamed(saved(tmp_path, "llama"), name="model")
    with weights_on_demand(streamed, blocks="model.layers"), pytest.raises(KeyError):
        _fail_in(streamed.hf.model.layers[1])
        logits(streamed.hf)
    assert held(streamed) == {} and not reader_threads()
    assert not streamed.hf._forward_hooks and not streamed.hf._forward_pre_hooks


def _fail_in(block: nn.Module) -> None:
    def fail(*_: Any) -> None:
        raise KeyError

    block.register_forward_hook(fail)


def test_blocks_out_of_order_are_refused_in_one_line(tmp_path: Path) -> None:
    streamed = open_streamed(saved(tmp_path, "llama"), name="model")
    first, second, third = streamed.hf.model.layers
    with (
        pytest.raises(InputError, match="once from end to end; turn `stream` off"),
        weights_on_demand(streamed, blocks="model.layers"),
    ):
        streamed.hf.model.layers = nn.ModuleList([second, first, third])
        logits(streamed.hf)
    assert held(streamed) == {}


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_model_that_sees_later_tokens_is_refused(stream: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, "gemma 3", use_bidirectional_attention=True)
    with pytest.raises(InputError, match="is not a decoder: a later token changes its logits") as refused:
        load_model(path, device="cpu", stream=stream)
    assert str(refused.value).startswith(f"{path} ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_logits_that_are_not_finite_are_called_so(stream: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, "llama")
    edit(path, lambda tensors: {**tensors, "model.norm.weight": torch.full((32,), 3e38)})
    with pytest.raises(InputError, match="its logits are not finite"):
        load_model(path, device="cpu", stream=stream)


def test_a_streamed_mixture_computes_in_float64(tmp_path: Path) -> None:
    path = saved(tmp_path, "gpt-oss")
    model = load_model(path, device="cpu", dtype="float64", stream=True)
    assert model.streamed is not None
    with weights_on_demand(model.streamed, blocks=model.anatomy.blocks):
        found = logits(model.hf)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), logits(load_weights(path)), rtol=0, atol=1e-3)


# The empty model.


_SOME = (
    "llama",
    "gpt-2",
    "gpt-j",
    "gpt-oss",
    "gemma 3",
    "xglm",
    "falcon, 7B",
    "deepseek v3",
    "glm 4 mixture",
    "laguna",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SOME else pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_an_empty_model_has_the_buffers_of_a_real_one_and_no_parameters(name: str, tmp_path: Path) -> None:
    kind, fields = CONFIGURATIONS[name]
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    empty, real = empty_model(tmp_path), AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [key for key, _ in empty.named_parameters()] == [key for key, _ in real.named_parameters()]
    found, stored = dict(empty.named_buffers()), real.state_dict()
    assert found.keys() == dict(real.named_buffers()).keys()
    for key, buffer in real.named_buffers():
        assert (found[key].dtype, found[key].shape) == (buffer.dtype, buffer.shape)
        assert key in stored or torch.equal(found[key], buffer), key  # what is stored is read from the files


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that was not on the meta device."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "llama4_text", "glm4_moe", "qwen3_moe", "llama"])
def test_a_large_model_is_built_without_memory(kind: str, tmp_path: Path) -> None:
    """The stacked experts of one layer of DeepSeek V3 are 30 GB."""
    AutoConfig.for_model(kind, num_hidden_layers=4).save_pretrained(tmp_path)
    with _Largest() as largest:
        hf = empty_model(tmp_path)
    assert sum(parameter.numel() for parameter in hf.parameters()) > 100 * largest.n_bytes
    assert largest.n_bytes < 2**20
