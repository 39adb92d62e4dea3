from dataclasses import replace

import numpy as np
import pytest

from dissect import InputError, patch
from dissect.decomposition.run import decompose
from dissect.stress.sweeps import GUARD, decomposition_sweep, patching_sweep, restoration_sweep
from tests.dissect.stress.constructed import case_of, gated, model

N = 4


def _values(result, role, variant, measure="krs"):
    frame = result.frame
    here = frame[(frame["role"] == role) & (frame["variant"] == variant) & (frame["measure"] == measure)]
    return here.sort_values("example_index")["value"].to_numpy()


def test_values_are_those_of_patch_and_its_control():
    case = case_of(model("demo:npo")).at_most(N)
    result = patching_sweep(case, sites=["attn_out", "mlp_coef"], window=3, guard=1.0)
    swept = patch(
        case.pair,
        case.forget.prompts,
        sites=["attn_out", "mlp_coef"],
        window=3,
        control=case.control,
        donor="other-question",
        engine="reference",
        progress=False,
    ).frame
    for arm, role in (("main", "unlearned"), ("control", "control")):
        for (site, first, last), rows in swept[swept["arm"] == arm].groupby(["site", "first_layer", "last_layer"]):
            rows = rows.sort_values("example_index")
            for measure in ("krs", "logprob_recovery"):
                found = _values(result, role, f"{site}, layers {first}-{last}", measure)
                np.testing.assert_allclose(found, rows[measure], atol=2e-4, rtol=1e-3)
    main, other = (
        swept[swept["arm"] == arm].set_index(["site", "centre", "example_index"])["krs"]
        for arm in ("main", "other-question")
    )
    net = (main - other.clip(lower=0))["attn_out", 4].sort_index()
    np.testing.assert_allclose(_values(result, "unlearned", "attn_out, layers 3-5", "krs_net"), net, atol=2e-4)
    assert (_values(result, "base", "attn_out, layers 3-5") == 1).all()


def test_rho_is_what_the_peak_closes_of_what_never_leaves_open():
    result = patching_sweep(case_of(model("demo:npo")).at_most(N), sites=["mlp_coef"])
    means = result.frame[result.frame["measure"] == "krs"].groupby(["role", "variant"])["value"].mean()
    ours, theirs = means["unlearned"].max(), means["control"].max()
    assert result.residual().rho == pytest.approx((ours - theirs) / (1 - theirs))


def test_places_that_answer_in_any_model_are_left_out():
    case = case_of(model("demo:npo")).at_most(N)
    result = patching_sweep(case)
    places = result.tables["variants"].set_index("variant")
    assert (places["kept"] == (places["control"] <= GUARD)).all()
    assert 0 < places["kept"].sum() < len(places) and "left out" in result.notes[0]
    assert set(result.frame["variant"]) == set(places.index[places["kept"]])
    strict = patching_sweep(
        case, sites=["attn_out"], guard=-9.0
    )  # nothing passes: the place that gives a never model least is kept
    attention = places[places.index.str.startswith("attn_out,")]
    assert set(strict.frame["variant"]) == {attention["control"].idxmin()}


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_the_gates_value_vector_back_is_everything_back(name):
    shut, gate = gated(name)
    result = restoration_sweep(case_of(shut, base=name).at_most(N), window=3)
    found = result.residual()
    assert found.rho > 0.9 and found.variant.endswith(f"-{gate.layer}")
    first = f"value_vectors, layers 0-{1}"
    assert _values(result, "unlearned", first).max() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "test", [patching_sweep, restoration_sweep, pytest.param(decomposition_sweep, marks=pytest.mark.slow)]
)
def test_never_as_unlearned_is_exactly_zero(test):
    result = test(case_of(model("demo:never")).at_most(2))
    for measure in ("krs", "logprob_recovery"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


@pytest.mark.slow
def test_decomposition_has_the_terms_of_decompose():
    case = case_of(model("demo:npo")).at_most(3)
    result = decomposition_sweep(case, sites=["mlp_out"], guard=1.0)
    split = decompose(case.pair, case.forget.prompts, sites=["mlp_out"], control=case.control, progress=False).frame
    for arm, role in (("main", "unlearned"), ("control", "control")):
        for term in ("weight", "coefficient"):
            rows = split[(split["arm"] == arm) & (split["term"] == term)]
            for first, last, where in ((2, 2, "layer 2"), (0, 7, "layers 0-7")):
                here = rows[(rows["first_layer"] == first) & (rows["last_layer"] == last)].sort_values("example_index")
                np.testing.assert_allclose(_values(result, role, f"mlp_out {term}, {where}"), here["krs"], atol=1e-4)


def test_without_a_never_model_another_question_stands_in():
    case = replace(case_of(model("demo:npo")).at_most(N), control=None)
    result = patching_sweep(case, sites=["attn_out"])
    places = result.tables["variants"].set_index("variant")
    floor = max(0.0, places["unlearned from other-question"].max())
    found = result.residual()
    assert result.floors == {"krs": pytest.approx(floor), "krs_net": 0.0} and found.against == "floor"
    assert found.rho == pytest.approx((places["unlearned"].max() - floor) / (1 - floor))
    assert "only a hint" in result.notes[0]


def test_without_a_never_model_null_models_stand_in_for_weights():
    case = replace(case_of(model("demo:npo")).at_most(N), control=None)
    result = restoration_sweep(case, null=2)
    assert result.floors["krs"] == pytest.approx(max(0.0, result.tables["variants"]["null"].max()))
    assert "moved at random" in result.notes[0]


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(3)
    with pytest.raises(InputError, match="terms.*weights"):
        decomposition_sweep(case, sites=["mlp_out"], terms=["weights"])
    with pytest.raises(InputError, match="nothing to recover"):
        restoration_sweep(case_of(model("demo:base")).at_most(1))
