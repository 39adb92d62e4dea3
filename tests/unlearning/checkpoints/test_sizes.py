"""Configurations whose models are larger than their files: refused before any memory or time is spent."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTJConfig,
    GPTNeoConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    XGLMConfig,
)

from dissect.models.model import load_model
from tests.unlearning.checkpoints.adapters import build_gpt2, logits, refused, save_base, train_adapter
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints import load
from unlearning.checkpoints.headers import Header
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.sizes import check_sizes
from unlearning.common.errors import InputError


def build(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config).eval()


SMALL = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "gpt2": build_gpt2,
    "gptj": lambda: build(GPTJConfig(vocab_size=384, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)),
    "gpt_neo": lambda: build(
        GPTNeoConfig(
            vocab_size=384,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
        )
    ),
    "xglm": lambda: build(
        XGLMConfig(vocab_size=384, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64)
    ),
    "mixtral": lambda: build(MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)),
    "qwen3_moe": lambda: build(
        Qwen3MoeConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: build(
        DeepseekV3Config(
            **SMALL,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        )
    ),
}


def restated(path: Path, *, whole: bool = False, **changes: Any) -> Path:
    """Change fields of a configuration, or replace all of it."""
    file = path / "config.json"
    stated = {} if whole else json.loads(file.read_text())
    file.write_text(json.dumps(stated | changes))
    return path


def memory() -> int:
    """Largest memory that this process ever had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_hidden_layers": 1_000_000}),
        ("llama", {"num_hidden_layers": 10**15}),
        ("llama", {"hidden_size": 10**9}),
        ("llama", {"intermediate_size": 10**12}),
        ("llama", {"vocab_size": 10**9}),
        ("llama", {"num_key_value_heads": 10**9}),
        ("llama", {"head_dim": 10**9}),
        ("llama", {"whole": True, "model_type": "llama"}),
        ("llama", {"whole": True, "model_type": "mixtral"}),
        ("llama", {"whole": True, "model_type": "gpt_neox"}),
        ("gpt2", {"n_layer": 1_000_000}),
        ("gpt2", {"n_embd": 4 * 10**9}),
        ("gpt2", {"n_inner": 10**11}),
        ("gpt2", {"n_positions": 10**10}),
        ("gpt2", {"whole": True, "model_type": "gpt2"}),
        ("gptj", {"n_positions": 10**10}),
        ("gpt_neo", {"max_position_embeddings": 10**6}),
        ("mixtral", {"num_local_experts": 1_000_000}),
        ("mixtral", {"num_local_experts": 100}),
    ],
    ids=str,
)
def test_a_model_larger_than_its_files_is_refused_at_once(
    family: str, changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = save_base(tmp_path / "model", FAMILIES[family])
    tokenizer.save_pretrained(path)
    restated(path, **changes)
    before, start = memory(), time.process_time()
    message = refused(path)
    for stream in (False, True):
        with pytest.raises(InputError) as error:
            load_model(path, device="cpu", stream=stream)
        assert str(error.value) == message
    assert time.process_time() - start < 20  # on a slow machine
    assert memory() - before < 2**29
    assert "the files do not belong together" in message or "correct max_position_embeddings" in message


def test_the_base_of_an_adapter_is_compared_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(tmp_path / "adapter", base)
    restated(base, num_hidden_layers=10**6)
    assert "num_hidden_layers is 1000000, and the weights beside it hold" in refused(tmp_path / "adapter")
    restated(base, num_hidden_layers=2, hidden_size=64)
    assert "and its config.json wants" in refused(tmp_path / "adapter")
    restated(base, hidden_size=32)
    load_weights(tmp_path / "adapter")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_of_their_own_size_are_read(family: str, tmp_path: Path) -> None:
    built = FAMILIES[family]()
    built.save_pretrained(tmp_path)
    assert (logits(load_weights(tmp_path)) - logits(built)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["intermediate_size", "num_key_value_heads", "head_dim", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused_in_one_line(
    name: str, value: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = restated(save_base(tmp_path / "model"), **{name: value})
    capfd.readouterr()
    recwarn.clear()
    assert refused(path) == f"{path / 'config.json'}: {name} must be at least 1, got {value}; copy it again"
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reading of weights be an error."""

    def read(*_arguments: object, **_options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "_read", read)


@pytest.mark.parametrize("value", [[], [1], 5, "x", True, {}, {"a": 1}], ids=str)
@pytest.mark.parametrize("name", ["text_config", "decoder"])
@pytest.mark.usefixtures("no_weights")
def test_a_part_that_is_none_is_refused_in_one_line(
    name: str, value: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = restated(save_base(tmp_path / "model"), **{name: value})
    capfd.readouterr()
    said = refused(path)
    if isinstance(value, dict):
        assert said == f"{path / 'config.json'}: model_type llama has no {name}; remove it, or copy the file again"
    else:
        shown = json.dumps(value)
        assert said == f"{path / 'config.json'}: {name} must be a JSON object, got {shown}; copy it again"
    assert capfd.readouterr() == ("", "")


def test_a_part_that_is_null_is_no_part(tmp_path: Path) -> None:
    built = build_tiny_llama()
    built.save_pretrained(tmp_path)
    restated(tmp_path, text_config=None)
    assert torch.equal(logits(load_weights(tmp_path)), logits(built))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("value", [0, -1, 5, 10**30, "2", 2.0], ids=str)
@pytest.mark.usefixtures("no_weights")
def test_routers_that_cannot_choose_are_refused_in_one_line(
    family: str, value: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = restated(save_base(tmp_path / "model", FAMILIES[family]), num_experts_per_tok=value)
    capfd.readouterr()
    said = refused(path)
    assert said.startswith(str(path)) and "\n" not in said and "num_experts_per_tok" in said
    if type(value) is int:
        assert "config.json: num_experts_per_tok must be a number from 1 to the 4 experts" in said
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("changes", [{"n_group": 3}, {"n_group": 0}, {"topk_group": 5}], ids=str)
def test_a_model_that_its_configuration_breaks_is_refused_in_one_line(
    changes: dict[str, int], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = restated(save_base(tmp_path / "model", FAMILIES["deepseek_v3"]), **changes)
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match=r"model \(DeepseekV3ForCausalLM\) cannot be run, .*; check its config.json$"):
        load_model(str(path))


NAMES = st.sampled_from(["num_hidden_layers", "hidden_size", "num_experts", "n_layer", "other", "layer_types"])
VALUES = st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.lists(st.integers()))
CONFIGS = st.recursive(
    st.dictionaries(NAMES, VALUES),
    lambda inner: st.dictionaries(NAMES | st.just("text_config"), VALUES | inner | st.lists(inner)),
    max_leaves=5,
)


@given(stated=CONFIGS, shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3))
def test_any_configuration_passes_or_is_refused(stated: dict[str, Any], shapes: list[list[int]]) -> None:
    headers = {str(number): Header("F32", tuple(shape)) for number, shape in enumerate(shapes)}
    layers = stated.get("num_hidden_layers")
    try:
        check_sizes(stated, headers, Path("config.json"))
    except InputError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
    else:
        assert type(layers) is not int or (layers >= 1 and (layers <= 128 or not shapes))


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "mpt", "gemma3_text", "qwen3_moe", "olmo2", "deepseek_v3"],
)
def test_the_default_model_of_a_family_is_as_large_as_its_weights(family: str) -> None:
    """No name of a size means something else in a family."""
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    headers = {name: Header("F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    check_sizes(config.to_dict(), headers, Path("config.json"))
