"""Models: what loads, what is refused, what the self-check catches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from dissect.models.anatomy import architecture_of
from dissect.models.model import Model, check_sites, load_model, resolve_dtype
from tests.dissect.helpers import build_model, build_pair, build_tokenizer, save_model
from unlearning.common.errors import InputError


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "gemma2", "olmo2", "phi3", "qwen3", "mistral"])
def test_every_site_is_found_in_every_family(family: str) -> None:
    model = build_pair(family).base
    assert model.missing_sites == {}
    assert model.n_layers == 3
    assert model.context == 128


def test_shards_and_one_file_are_the_same_model(tmp_path: Path) -> None:
    whole = load_model(save_model(tmp_path / "whole", "llama"), device="cpu")
    sharded_path = save_model(tmp_path / "sharded", "llama", shard="30KB")
    assert len(list(sharded_path.glob("*.safetensors"))) > 1
    assert load_model(sharded_path, device="cpu").sha256 == whole.sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(save_model(tmp_path / "half", "llama", dtype=dtype), device="cpu")
    assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.float32}
    weight = build_model("llama").get_input_embeddings().weight
    assert torch.equal(model.hf.get_input_embeddings().weight, weight.to(dtype).float())
    with pytest.raises(InputError, match="dtype.*CPU.*bfloat16"):
        resolve_dtype("bfloat16", torch.device("cpu"))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load_model(save_model(tmp_path / "tied", "llama"), device="cpu")
    assert model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight


def test_a_changed_weight_changes_the_hash() -> None:
    pair = build_pair("llama", chosen=lambda name: name.endswith("layers.1.mlp.up_proj.weight"))
    assert pair.base.sha256 != pair.unlearned.sha256


def test_a_weight_that_is_not_finite_is_named() -> None:
    hf = build_model("llama")
    with torch.no_grad():
        hf.get_submodule("model.layers.1.mlp.up_proj").weight[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(InputError, match=r"2 of 1536 values of the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        Model.wrap(hf, build_tokenizer(), name="broken")


def test_a_site_that_two_layers_share_is_reported_missing() -> None:
    """One module for two layers: an activation of it belongs to neither."""
    hf = build_model("llama")
    hf.model.layers[1].self_attn = hf.model.layers[0].self_attn
    missing = Model.wrap(hf, build_tokenizer(), name="shared").missing_sites
    assert list(missing) == ["attn_out"]
    assert "attn_out of layer 0 occurred 2 times" in missing["attn_out"]


class AddingAttention(LlamaAttention):
    """It adds the residual stream to what it writes, without a word of it in its signature."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return output + kwargs["hidden_states"], weights


def test_an_output_that_holds_something_else_too_is_no_site() -> None:
    hf = build_model("llama")
    for block in hf.model.layers:
        block.self_attn.__class__ = AddingAttention
    missing = Model.wrap(hf, build_tokenizer(), name="adding").missing_sites
    assert list(missing) == ["attn_out"]
    assert "AddingAttention returns more than the output of its projection" in missing["attn_out"]


def test_a_model_that_its_own_activations_change_is_refused() -> None:
    """A model whose forward is not the same twice: nothing that it gives can be trusted."""
    model = build_pair("gpt2").base
    calls = []

    def drift(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits + len(calls)

    model.hf.get_output_embeddings().register_forward_hook(drift)
    with pytest.raises(InputError, match="own activations changes its logits by"):
        check_sites(model)
    assert len(calls) >= 2


def with_config(path: Path, change: Any) -> Path:
    """The checkpoint with another configuration."""
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_an_architecture_named_wrongly_is_that_of_the_class(stream: bool, tmp_path: Path) -> None:
    named = with_config(save_model(tmp_path / "model", "llama"), lambda config: config | {"architectures": ["Mamba"]})
    model = load_model(named, device="cpu", stream=stream)
    assert architecture_of(model.hf) == "LlamaForCausalLM" and model.missing_sites == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: config | {"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
        (lambda config: config | {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        (lambda config: [config], "config.json: broken"),
        (
            lambda _config: MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=384).to_dict(),
            "no attention",
        ),
    ],
)
def test_a_configuration_that_tells_is_refused_before_any_weight_is_read(
    change: Any, reason: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_config(save_model(tmp_path / "model", "llama"), change)
    for place in ("dissect.models.model.load_weights", "dissect.models.streamed_model.fingerprint"):
        monkeypatch.setattr(place, lambda *_args, **_options: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=reason) as refused:
        load_model(path, device="cpu", stream=stream)
    assert "\n" not in str(refused.value)
