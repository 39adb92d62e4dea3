import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from dissect import InputError
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.stress.core.case import Case
from dissect.stress.core.scores import score_facts
from dissect.stress.interpolation import interpolation, moved
from tests.dissect.stress.constructed import case_of, gated, model

N = 8


@pytest.mark.parametrize("family", ["demo", "demo-neox"])
def test_every_weight_is_moved_by_the_share_and_the_models_stay(family):
    ours, base = model(f"{family}:npo"), model(f"{family}:base")
    before = {name: value.clone() for name, value in ours.hf.named_parameters()}
    after = moved(ours, base, 0.3)
    for name, value in after.hf.named_parameters():
        theirs = base.hf.get_parameter(name)
        torch.testing.assert_close(value, 0.7 * before[name] + 0.3 * theirs, atol=1e-6, rtol=1e-5)
        assert torch.equal(ours.hf.get_parameter(name), before[name])
    assert after.sha256 not in (ours.sha256, base.sha256)


@settings(max_examples=5)
@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_two_steps_are_one(one, other):
    ours, base = model("demo-neox:npo"), model("demo-neox:base")
    twice = moved(moved(ours, base, one), base, other)
    once = moved(ours, base, 1 - (1 - one) * (1 - other))
    for name, value in once.hf.named_parameters():
        torch.testing.assert_close(twice.hf.get_parameter(name), value, atol=1e-5, rtol=1e-4)


def test_a_weight_under_two_names_stays_one():
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        hf = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=1000, n_positions=32))
        made.append(Model.wrap(hf, model("demo:base").tokenizer, name="gpt2"))
    after = moved(*made, 0.5).hf
    assert after.lm_head.weight.data_ptr() == after.transformer.wte.weight.data_ptr()
    expected = (made[0].hf.lm_head.weight + made[1].hf.lm_head.weight) / 2
    torch.testing.assert_close(after.lm_head.weight, expected)


def test_a_model_on_the_way_from_never_to_base_is_further_along_by_each_step():
    """W = never + s (base - never) moved by t is never + (s + t - s t) (base - never), whose scores can be had."""
    never, base = model("demo:never"), model("demo:base")
    case = case_of(moved(never, base, 0.4), n=N)
    result = interpolation(case, steps=(0.1, 0.3))
    for t in (0.1, 0.3):
        expected = score_facts(moved(never, base, 0.4 + t - 0.4 * t), case.forget)
        rows = result.frame.query(f"role == 'unlearned' and variant == 't {t:g}' and measure == 'logprob'")
        np.testing.assert_allclose(rows["value"], expected.logprob, atol=1e-3)


def test_the_base_as_unlearned_stays_and_the_never_model_is_no_better_than_itself():
    base, never = (interpolation(case_of(model(f"demo:{name}"), n=N), steps=(0.05,)) for name in ("base", "never"))
    assert base.residual().rho > 0.9
    assert never.residual().rho == never.residual().low == never.residual().high == 0
    assert base.level == 2 and "way to the base's" in base.proves


def test_a_gate_that_is_small_is_passed_by_a_small_step():
    """A weak gate lets go of half of the answers at t = 0.3, where the never model has hardly learnt any."""
    case = case_of(gated(strength=50.0)[0], n=16)
    result = interpolation(case, steps=(0.3,))
    means = result.frame.query("measure == 'correct'").groupby(["role", "variant"])["value"].mean()
    assert means["unlearned", ""] < 0.2
    assert means["unlearned", "t 0.3"] > means["control", "t 0.3"] + 0.3
    assert result.residual().low > 0


def test_the_curve_ends_in_the_base_whoever_walks():
    case = case_of(model("demo:npo"), n=N)
    curve = interpolation(case, steps=(0.2,)).tables["curve"].set_index(["role", "t"])
    assert set(curve.index) == {(role, t) for role in ("unlearned", "control") for t in (0.0, 0.2, 1.0)}
    end = score_facts(case.pair.base, case.forget).logprob.mean()
    assert curve.loc[("unlearned", 1.0), "logprob"] == curve.loc[("control", 1.0), "logprob"] == pytest.approx(end)


def test_without_a_never_model_nothing_is_claimed():
    case = case_of(model("demo:npo"), n=N)
    alone = Case(ModelPair(case.pair.base, case.pair.unlearned), None, case.forget)
    found = interpolation(alone, steps=(0.1,)).residual()
    assert found.rho is None and "without a control" in found.reason


@pytest.mark.parametrize("steps", [(), (0.0,), (1.0,), (0.1, 0.1), (-0.1, 0.5)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(InputError, match="steps.*above 0 and below 1"):
        interpolation(case_of(model("demo:npo"), n=N), steps=steps)
