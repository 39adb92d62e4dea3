"""Random rewritings: other weights, the same outputs."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dissect import InputError, load_model
from dissect.models.rewriting import rewritten
from tests.dissect.models.rewriting_helpers import FAMILIES, logit_gap, random_model, weight_gap, weight_gaps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rewriting_changes_weights_a_lot_and_outputs_by_rounding(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, dtype=dtype)
    before = {name: values.clone() for name, values in model.hf.state_dict().items()}
    other = rewritten(model, seed=1)
    assert logit_gap(model, other) < 1e-4
    assert weight_gap(model, other) > 10
    changed = [gap > 0.1 for gap in weight_gaps(model, other).values()]
    assert sum(changed) > 0.9 * len(changed) - 2
    assert other.sha256 != model.sha256
    assert all(torch.equal(values, before[name]) for name, values in model.hf.state_dict().items())


def test_the_factors_have_the_stated_range() -> None:
    model = random_model("llama")
    widest = 0.0
    for seed in range(4):
        other = rewritten(model, seed=seed, largest=100.0, kinds=["mlp"])
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            factors = (other.hf.get_parameter(name) / model.hf.get_parameter(name)).detach().abs()
            assert float(factors.min()) >= 0.0099 and float(factors.max()) <= 101
            widest = max(widest, float(factors.max() / factors.min()))
    assert widest > 100  # a factor for each neuron
    same = {key for key, gap in weight_gaps(model, other).items() if gap == 0}
    sides = ("up_proj.weight", "down_proj.weight")
    assert same == {key for key, _ in model.hf.named_parameters() if not key.endswith(sides)}


def test_seeds_give_different_rewritings_and_the_same_one_the_same() -> None:
    model = random_model("llama")
    one, again, other = (rewritten(model, seed=seed).sha256 for seed in (0, 0, 1))
    assert one == again != other


def test_a_checkpoint_of_a_rewriting_holds_its_epsilon(tmp_path: object) -> None:
    model = random_model("llama", dtype=torch.float32)
    other = rewritten(model, seed=0, kinds=["stream"])
    assert other.hf.config.rms_norm_eps != model.hf.config.rms_norm_eps
    other.hf.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert logit_gap(other, replace(other, hf=loaded)) == 0


def test_the_demo_s_base_can_be_rewritten() -> None:
    model = load_model("demo:base", device="cpu")
    assert logit_gap(model, rewritten(model, seed=0)) < 1e-4


@pytest.mark.parametrize("largest", [0.5, float("inf"), float("nan")])
def test_a_factor_below_one_is_refused(largest: float) -> None:
    with pytest.raises(InputError, match="`largest` must be a number of at least 1, got"):
        rewritten(random_model("llama", n_layers=1), seed=0, largest=largest)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="`kinds` must be some of norm, .* got colour"):
        rewritten(random_model("llama", n_layers=1), seed=0, kinds=["norm", "colour"])
