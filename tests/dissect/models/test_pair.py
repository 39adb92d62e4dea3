"""Pairs: what loads, and what cannot be compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM

from dissect import load_pair
from dissect.interventions.intervention import sweep as all_in
from dissect.interventions.windows import Window
from dissect.models.model import Model
from dissect.models.pair import ModelPair, check_comparable, resolve_control
from tests.dissect.families import CONFIGURATIONS, inputs_of
from tests.dissect.families import run as logits_of
from tests.dissect.helpers import (
    assert_close,
    build_batch,
    build_model,
    build_pair,
    build_tokenizer,
    change_weights,
    run_engine,
    save_model,
)
from unlearning.common.errors import InputError


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_a_saved_pair_loads_with_the_weights_it_was_saved_with(family: str, tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", family)
    pair = load_pair(path, path, device="cpu")
    built = Model.wrap(build_model(family), build_tokenizer(), name="built")
    assert pair.base.sha256 == pair.unlearned.sha256 == built.sha256
    assert pair.base.name == str(path)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(pair.base.hf(ids).logits, built.hf(ids).logits)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: build_model("mistral"), "architecture: LlamaForCausalLM and MistralForCausalLM"),
        (lambda: build_model("llama", n_layers=2), "layers: 3 and 2"),
        (lambda: build_model("llama", vocab_size=400), "vocabulary: 384 and 400"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(other: Any, what: str) -> None:
    tokenizer = build_tokenizer()
    base = Model.wrap(build_model("llama"), tokenizer, name="one")
    with pytest.raises(InputError, match=f"one and two differ in {what}"):
        check_comparable(base, Model.wrap(other(), tokenizer, name="two"))


def family(name: str, **fields: Any) -> Model:
    kind, given = CONFIGURATIONS[name]
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given | fields))
    return Model.wrap(hf, build_tokenizer(), name="two" if fields else "one")


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        ("llama", {"attention_bias": True}, r"two has the tensor .*q_proj\.bias, which one does not have"),
        ("llama", {"mlp_bias": True}, r"two has the tensor .*\.bias, which one does not have"),
        ("stablelm", {"use_parallel_residual": True}, r"one has the tensor .*norm\.weight, which two does not have"),
        ("gpt-2", {"n_positions": 64}, r"one and two differ in the shape of .*wpe\.weight: \(128, 32\) and \(64, 32\)"),
        ("qwen3 mixture", {"mlp_only_layers": [1]}, "one has the tensor .*which two does not have"),
        ("qwen3 mixture", {"moe_intermediate_size": 20}, "one and two differ in the shape of .*experts"),
        ("mixtral", {"num_local_experts": 6}, "one and two differ in the shape of .*gate"),
    ],
)
def test_models_of_other_parts_are_refused(name: str, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        check_comparable(family(name), family(name, **fields))
    with pytest.raises(InputError):
        check_comparable(family(name, **fields), family(name))


def test_a_streamed_pair_of_two_configurations_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", "llama")
    for field, value in (("rms_norm_eps", 0.5), ("attention_dropout", 0.5)):
        other = shutil.copytree(path, tmp_path / field)
        config = json.loads((other / "config.json").read_text(encoding="utf-8"))
        (other / "config.json").write_text(json.dumps(config | {field: value}), encoding="utf-8")
    with pytest.raises(InputError, match="rms_norm_eps = 0.5 in its configuration.*turn `stream` off"):
        load_pair(path, tmp_path / "rms_norm_eps", device="cpu", stream=True)
    with pytest.warns(UserWarning, match="attention_dropout"):
        load_pair(path, tmp_path / "attention_dropout", device="cpu", stream=True)


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
@pytest.mark.parametrize("tied", ["base", "unlearned"])
def test_one_tied_and_one_untied_model_are_a_pair_that_is_told_of(tied: str, engine: str, tmp_path: Path) -> None:
    """Each end is restored by itself, as in an untied model into which the weights were written."""
    hf = {role: build_model("llama", tied=role == tied) for role in ("base", "unlearned")}
    change_weights(hf["unlearned"], scale=0.05)
    pair = ModelPair(*(Model.wrap(one, build_tokenizer(), name=role) for role, one in hf.items()))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        check_comparable(pair.base, pair.unlearned)
    batch = build_batch(tmp_path, "left")
    items = all_in([("embed",), ("unembed",)], [Window(0, (0,))], pair.base.weights)
    ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], items)
    for found, end in zip(swept.intervened, ("get_input_embeddings", "get_output_embeddings"), strict=True):
        written: Any = build_model("llama", tied=False)
        for name, parameter in hf["unlearned"].named_parameters(remove_duplicate=False):
            written.get_parameter(name).data.copy_(parameter)
        getattr(written, end)().weight.data.copy_(getattr(hf["base"], end)().weight)
        expected = logits_of(written, inputs_of(pair.base, batch))[batch.rows, batch.columns]
        assert float((expected - swept.target).abs().max()) > 1e-2
        assert_close(found, expected, atol=5e-5)


def test_tokenizers_that_differ_in_a_token_are_warned_of(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", "llama")
    other = shutil.copytree(path, tmp_path / "other")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<zz>", special=True)])
    tokenizer.save_pretrained(other)
    with pytest.warns(UserWarning, match=r"token '<zz>' \(None and \d+\)"):
        pair = load_pair(path, other, device="cpu")
    assert pair.tokenizer is pair.base.tokenizer


def test_a_control_is_one_that_can_be_compared() -> None:
    pair = build_pair("llama")
    third = Model.wrap(build_model("llama", seed=3), pair.tokenizer, name="third")
    assert resolve_control(pair, "auto") is None  # which no built-in pair is
    assert resolve_control(pair, None) is resolve_control(pair, "none") is None
    assert resolve_control(pair, third) is third
    other = Model.wrap(build_model("llama", n_layers=2), pair.tokenizer, name="other")
    with pytest.raises(InputError, match="base and other differ in"):
        resolve_control(pair, other)
    with pytest.raises(InputError, match="no-such-model"):
        resolve_control(pair, "./no-such-model")


def adapter_of(base: Path, directory: Path) -> Path:
    from unlearning.checkpoints.load import load_weights
    from unlearning.checkpoints.lora import add_adapter, save_adapter

    model = load_weights(base)
    add_adapter(model, rank=2, alpha=8, base=str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, directory)
    return directory


def test_an_adapter_must_be_of_the_base(tmp_path: Path) -> None:
    """Recovery would mix what unlearning changed with what the two bases differ in."""
    base = save_model(tmp_path / "base", "llama")
    adapter = adapter_of(base, tmp_path / "adapter")
    same = shutil.copytree(base, tmp_path / "same")  # another place, the same weights
    assert (
        load_pair(same, adapter, device="cpu").unlearned.sha256
        == load_pair(base, adapter, device="cpu").unlearned.sha256
    )
    other = shutil.copytree(base, tmp_path / "other")
    build_model("llama", seed=5).save_pretrained(other)
    with pytest.raises(
        InputError, match="^`unlearned`: .*is an adapter of .*base, whose weights are not those of .*other"
    ) as error:
        load_pair(other, adapter, device="cpu")
    assert f"set `base` to {base}" in str(error.value)
    assert load_pair(adapter, other, device="cpu").base.sha256 != load_pair(base, other, device="cpu").base.sha256
