from dataclasses import replace

import numpy as np
import pytest

from dissect import InputError
from dissect.models.module_tree import with_values
from dissect.stress.coefficient_scaling import coefficient_scaling, scaled
from dissect.stress.core.edits import remembered_scores, remembering
from dissect.stress.core.scores import score_facts
from tests.dissect.stress.constructed import case_of, gated, model

N = 8


def _by_variant(result, role, variant, measure="rank"):
    frame = result.frame
    here = frame[(frame["role"] == role) & (frame["variant"] == variant) & (frame["measure"] == measure)]
    return here.sort_values("example_index")["value"].to_numpy()


@pytest.mark.parametrize("name", ["demo:base", "demo-neox:base"])
def test_leaving_the_gates_layer_out_brings_every_answer_back(name):
    shut, gate = gated(name)
    case = case_of(shut, base=name).at_most(N)
    result = coefficient_scaling(case, sites=["mlp_coef"], last=[1], factors=[0.0, 1.5], skipped=0)
    found = result.residual()
    assert found.variant == "mlp_coef of the last layer x 0" and found.rho > 0.8
    # Without the gate's layer the two models are one, to the last bit.
    ours, base = (_by_variant(result, role, found.variant, "logprob") for role in ("unlearned", "base"))
    np.testing.assert_array_equal(ours, base)
    assert _by_variant(result, "unlearned", "", "correct").mean() == 0
    assert gate.layer == model(name).n_layers - 1


def test_never_as_unlearned_is_exactly_zero():
    result = coefficient_scaling(case_of(model("demo:never")).at_most(4), last=[2], factors=[0.5], skipped=0)
    for measure in ("rank", "logprob", "correct"):
        found = result.residual(measure)
        assert (found.rho or 0) == (found.low or 0) == (found.high or 0) == 0


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_scaling_coefficients_is_scaling_the_value_vectors(name):
    of = model(name)
    facts = case_of(of, base=name.replace("npo", "base")).at_most(6).forget
    layers = (of.n_layers - 3, of.n_layers - 1)
    names = [name for layer in layers for name in of.weights.at({"value_vectors"}, layer) if name.endswith("weight")]
    heavier = replace(of, hf=with_values(of.hf, {name: 1.7 * of.hf.get_parameter(name).data for name in names}))
    expected = score_facts(heavier, facts).logprob
    with scaled(of, "mlp_coef", layers, 1.7):
        np.testing.assert_allclose(score_facts(of, facts).logprob, expected, atol=1e-5)
    assert abs(score_facts(of, facts).logprob - expected).max() > 0.01  # the hooks are off again


def test_outputs_without_a_bias_scale_as_coefficients_do():
    of = model("demo:npo")
    facts = case_of(of).at_most(6).forget
    logprobs = []
    for site in ("mlp_coef", "mlp_out"):
        with scaled(of, site, [5, 6], 0.5):
            logprobs.append(score_facts(of, facts).logprob)
    np.testing.assert_allclose(*logprobs, atol=1e-5)


def test_attention_left_out_is_attention_without_an_output_projection():
    of = model("demo:base")
    facts = case_of(model("demo:npo")).at_most(6).forget
    name = next(name for name in of.weights.at({"W_O"}, 7) if name.endswith("weight"))
    without = replace(of, hf=with_values(of.hf, {name: 0 * of.hf.get_parameter(name).data}))
    with scaled(of, "attn_out", [7], 0.0):
        np.testing.assert_allclose(score_facts(of, facts).logprob, score_facts(without, facts).logprob, atol=1e-5)


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
@pytest.mark.parametrize("layer", [0, 1, 4])
def test_what_is_remembered_changes_no_number(name, layer):
    of = model(name)
    facts = case_of(of, base=name.replace("npo", "base")).at_most(5).forget
    plain, memory = remembered_scores(of, facts, layer, batch_size=7)
    np.testing.assert_allclose(plain.logprob, score_facts(of, facts, batch_size=7).logprob, atol=1e-6)
    assert (memory is None) == (layer == 0)
    with scaled(of, "mlp_coef", [layer], 0.0):
        expected = score_facts(of, facts, batch_size=7).logprob
        with remembering(of, layer, memory):
            again = score_facts(of, facts, batch_size=7).logprob
    np.testing.assert_allclose(again, expected, atol=1e-6)
    assert abs(expected - plain.logprob).max() > 1e-3


def test_hooks_are_off_after_an_exception():
    of = model("demo:npo")
    facts = case_of(of).at_most(3).forget
    before = score_facts(of, facts).logprob
    with pytest.raises(ZeroDivisionError), remembering(of, 3, {}), scaled(of, "attn_out", [2], 3.0):
        1 / 0  # noqa: B018
    np.testing.assert_array_equal(score_facts(of, facts).logprob, before)
    assert all("forward" not in vars(module) for module in of.hf.modules())


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(3)
    with pytest.raises(InputError, match="sites.*resid"):
        coefficient_scaling(case, sites=["resid"])
    with pytest.raises(InputError, match="last.*from 1"):
        coefficient_scaling(case, last=[0])
