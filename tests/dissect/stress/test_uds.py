from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dissect import InputError
from dissect.models.anatomy import block_of
from dissect.models.null_models import null_model
from dissect.stress.uds import donor_items, source_deltas, uds, unlearning_depth
from tests.dissect.stress.constructed import case_of, gated, model

N = 12


def test_uds_by_hand():
    retain = np.array([[0.04, 0.5, 0.0], [0.3, 0.5, 0.01], [0.1, 1.0, -2.0]])
    unlearned = np.array([[9.0, 0.25, 0.0], [0.6, -1.0, 0.0], [0.05, 1.0, 0.0]])
    # Fact 0: the first layer is below tau; (0.3 * 1 + 0.1 * 0.5) / 0.4. Fact 1: (0.25 + 0 + 1) / 2. Fact 2: no layer.
    found = uds(retain, unlearned, tau=0.05)
    np.testing.assert_allclose(found[:2], [0.875, 0.625])
    assert np.isnan(found[2])


_DELTAS = arrays(np.float64, (4, 3), elements=st.floats(-2, 5))


@settings(max_examples=60)
@given(_DELTAS, _DELTAS)
def test_uds_is_the_papers_loop_and_a_share(retain, unlearned):
    found = uds(retain, unlearned)
    for fact in range(3):
        encoding = [layer for layer in range(4) if retain[layer, fact] > 0.05]
        if not encoding:
            assert np.isnan(found[fact])
            continue
        ratios = [min(max(unlearned[layer, fact] / retain[layer, fact], 0.0), 1.0) for layer in encoding]
        weights = [retain[layer, fact] for layer in encoding]
        assert found[fact] == pytest.approx(np.dot(weights, ratios) / sum(weights))
        assert 0 <= found[fact] <= 1
    np.testing.assert_allclose(uds(retain, retain)[~np.isnan(found)], 1)
    np.testing.assert_allclose(uds(retain, np.zeros_like(retain))[~np.isnan(found)], 0)


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_deltas_are_those_of_one_hooked_forward(name):
    of, base = model(name), model(name.partition(":")[0] + ":base")
    case = case_of(of, base=base.name, n=5)
    found = source_deltas(replace(case, batch_size=2), donor_items(case.forget, 2))
    item, fact = case.forget.prompts.items[3], 3
    ids, at = torch.tensor([item.input_ids]), list(item.scored)
    next_ids = torch.tensor([item.input_ids[position + 1] for position in at])

    def block(of, layer):
        return block_of(of.hf, of.anatomy, layer).whole

    def logprob():
        logits = base.hf(input_ids=ids).logits[0, at].double()
        return float(logits.log_softmax(-1).gather(1, next_ids[:, None]).mean())

    with torch.inference_mode():
        plain = logprob()
        for layer in (0, 2, base.n_layers - 1):
            kept = []
            handle = block(of, layer).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0, at]))
            of.hf(input_ids=ids)
            handle.remove()

            def put(_module, _args, out, kept=kept):
                out = out.clone()
                out[0, at] = kept[0]
                return out

            handle = block(base, layer).register_forward_hook(put)
            assert found["unlearned"].patched[layer, fact] == pytest.approx(plain - logprob(), abs=1e-4)
            handle.remove()
    # At the last layer the patched state goes through the base's norm and head alone, as under the lens.
    np.testing.assert_allclose(found["unlearned"].patched[-1], found["unlearned"].lens[-1], atol=1e-4)


def _means(case):
    result = unlearning_depth(case)
    table = result.frame.groupby(["measure", "role"])["value"].agg(["mean", "min", "max"])
    return result, table


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_the_base_as_unlearned_is_intact_at_every_layer(name):
    # A copy with another identity, so that its states are really read and patched.
    result, table = _means(case_of(replace(model(name), name="copy"), base=name, n=N))
    for measure in ("uds", "uds_lens", "uds_donor"):
        assert table.loc[(measure, "unlearned"), "min"] == pytest.approx(1, abs=1e-4)
    layers = result.tables["layers"]
    assert layers.loc[layers["source"] == "unlearned", "delta"].abs().max() < 1e-4  # the last one too
    assert result.residual().rho == pytest.approx(1, abs=1e-4)


def test_the_never_model_as_unlearned_is_erased():
    result, table = _means(case_of(model("demo:never"), n=N))
    for measure in ("uds", "uds_lens"):
        assert table.loc[(measure, "unlearned"), "max"] == table.loc[(measure, "control"), "max"] == 0
        assert table.loc[(measure, "base"), "min"] == 1
    found = result.residual()
    assert found.rho == found.low == found.high == 0


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_what_a_gate_hides_in_the_last_layer_is_intact_before_it(name):
    shut, gate = gated(name)
    result = unlearning_depth(case_of(shut, base=name, n=N))
    found = result.residual()
    assert found.rho == pytest.approx(1, abs=1e-4) and found.variant != f"layer {gate.layer}"
    last = result.residuals().set_index(["measure", "variant"]).loc[("kept", f"layer {gate.layer}"), "rho"]
    assert last < 0.1
    alone = unlearning_depth(replace(case_of(shut, base=name, n=N), control=None)).residual()
    assert alone.against == "floor" and alone.rho == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_never_model_that_was_moved_is_erased_by_what_decides_and_not_by_uds():
    """Its states differ from the never model's by noise: clipping makes knowledge of it, the share kept does not."""
    moved = null_model(model("demo:never"), model("demo:whp"), seed=1)
    result = unlearning_depth(case_of(moved, n=120))
    assert result.residual("uds").low > 0.05
    found = result.residual()
    assert found.low < 0.05 and found.rho < 0.1


def test_donors_ask_the_same_of_someone_else():
    facts = case_of(model("demo:base"), n=60).forget
    for item, donors in zip(facts.prompts.items, donor_items(facts, 3), strict=True):
        own = facts.prompts.items
        for donor in donors:
            asked = next(other for other in own if other.id == donor.id)
            assert donor.id.partition("-")[2] == item.id.partition("-")[2]
            assert donor.group != item.group and asked.answer != item.answer
            assert donor.input_ids[donor.answer_start :] == item.input_ids[item.answer_start :]
            assert donor.input_ids[: donor.answer_start] == asked.input_ids[: asked.answer_start]
            assert len(donor.scored) == len(item.scored) and donor.scored.start == donor.answer_start - 1


def test_bad_input():
    case = case_of(model("demo:npo"), n=N)
    alone = case.forget.select([0])
    with pytest.raises(InputError, match="no question of another group has another answer"):
        unlearning_depth(replace(case, forget=alone))
    never = model("demo:never")
    with pytest.raises(InputError, match="does not encode these facts"):
        unlearning_depth(replace(case, pair=replace(case.pair, base=never)), tau=50.0)
