"""Names that wrappers changed, and prefixes that are not known."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from dissect.models.model import load_model
from tests.unlearning.checkpoints.adapters import BUILDERS, logits, refused, save_base
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.keys import INSERTED, OUTERMOST, common_prefix, find_wrappers, without_wrappers
from unlearning.checkpoints.load import load_weights
from unlearning.common.errors import InputError

NAMES = list(build_tiny_llama().state_dict())


def renamed(path: Path, rename: dict[str, str]) -> Path:
    tensors = load_file(path / "model.safetensors")
    save_file({rename.get(name, name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def prefixed(path: Path, prefix: str) -> Path:
    return renamed(path, {name: prefix + name for name in load_file(path / "model.safetensors")})


@given(
    outer=st.lists(st.sampled_from([*OUTERMOST, *INSERTED]), max_size=3),
    inner=st.dictionaries(st.sampled_from(["model.", "layers.1.", "mlp.", "self_attn."]), st.sampled_from(INSERTED)),
)
def test_whatever_wrappers_insert_is_found_and_taken_off(outer: list[str], inner: dict[str, str]) -> None:
    def wrapped(name: str) -> str:
        for part, inserted in inner.items():
            name = name.replace(part, part + inserted)
        return "".join(outer) + name

    names = [wrapped(name) for name in NAMES]
    wrappers = find_wrappers(names)
    assert [without_wrappers(name, wrappers) for name in names] == NAMES
    assert set(wrappers) == {*outer, *inner.values()}


@pytest.mark.parametrize("prefix", [*INSERTED, *OUTERMOST, "module._orig_mod."])
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_wrapped_checkpoints_are_read_and_said(
    prefix: str, stream: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = prefixed(save_base(tmp_path / "model"), prefix)
    tokenizer.save_pretrained(path)
    with pytest.warns(UserWarning, match="the names of its weights are read without"):
        model = load_model(path, device="cpu", stream=stream)
    assert model.sha256 == content_hash(build_tiny_llama(), name="model")


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_names_within_blocks_are_read_in_every_family(family: str, tmp_path: Path) -> None:
    built = BUILDERS[family]()
    built.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    inner = {name: "_fsdp_wrapped_module." + name.replace(".1.", ".1._fsdp_wrapped_module.") for name in names}
    with pytest.warns(UserWarning, match="_fsdp_wrapped_module"):
        loaded = load_weights(renamed(tmp_path, inner))
    assert torch.equal(logits(loaded), logits(built))
    assert loaded.generation_config.eos_token_id == built.generation_config.eos_token_id
    loaded.save_pretrained(tmp_path / "again")  # under the model's own names
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(names)


def test_an_unknown_prefix_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = prefixed(save_base(tmp_path / "model"), "student.")
    tokenizer.save_pretrained(path)
    for stream in (False, True):
        with pytest.raises(InputError, match=r"the names of its weights begin with student\., .* take it off") as error:
            load_model(path, device="cpu", stream=stream)
        assert "missing keys" not in str(error.value)
    bare = renamed(save_base(tmp_path / "bare"), {name: "net." + name.removeprefix("model.") for name in NAMES})
    assert "begin with net." in refused(bare)
    renamed(path, {"student.lm_head.weight": "head.weight"})  # only some are there
    assert "missing keys in its weights" in refused(path)


@pytest.mark.parametrize(
    "lost",
    [
        ["model.norm.weight"],
        ["model.layers.1.self_attn.o_proj.weight"],
        ["lm_head.weight", "model.embed_tokens.weight"],
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_missing_weights_are_not_taken_for_a_prefix(
    lost: list[str], stream: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Names of other tensors end like theirs: `model.layers.0.input_layernorm.weight` like `norm.weight`."""
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in lost:
        del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{len(lost)} missing keys in its weights, such as {lost[0]}"):
        load_model(path, device="cpu", stream=stream)


@given(lost=st.sets(st.sampled_from(NAMES), min_size=1), extra=st.sets(st.sampled_from(NAMES)))
def test_a_prefix_is_whole_parts_of_names_without_a_place(lost: set[str], extra: set[str]) -> None:
    assert common_prefix(lost, set(), "model") is None
    assert common_prefix(lost, {f"x{name}" for name in lost}, "") is None
    assert common_prefix(lost, {f"a.b.{name}" for name in lost | extra}, "model") == "a.b."


def test_a_plain_checkpoint_is_read_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(save_base(tmp_path / "model"))


def test_an_adapter_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
    inner = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file({**tensors, f"{inner}lora_A.weight": torch.ones(4, 32)}, path / "model.safetensors")
    assert "an adapter that is not merged" in refused(path)
    tensors[f"{inner}base_layer.weight"] = tensors.pop(f"{inner}weight")
    save_file(tensors, path / "model.safetensors")
    assert "an adapter that is not merged" in refused(path)


def test_a_tensor_that_is_stored_under_two_names_is_refused(tmp_path: Path) -> None:
    path = save_base(tmp_path / "model", BUILDERS["gpt2"])
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "ln_f.weight": tensors["transformer.ln_f.weight"] + 1}, path / "model.safetensors")
    assert "ln_f.weight and transformer.ln_f.weight are both" in refused(path)
