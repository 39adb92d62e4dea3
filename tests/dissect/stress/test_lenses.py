from dataclasses import replace

import numpy as np
import pytest
import torch

from dissect import InputError
from dissect.models.anatomy import block_of
from dissect.stress.core.residual_stream import residual_stream, states_at
from dissect.stress.core.scores import score_facts
from dissect.stress.lenses import (
    FitOptions,
    Translators,
    first_token_ranks,
    fit_translators,
    lens_values,
    logit_lens,
    oriented_ranks,
    tuned_lens,
)
from tests.dissect.stress.constructed import case_of, gated, model

N = 8
FEW_STEPS = {"steps": 4, "batch_tokens": 32, "max_tokens": 200, "layers": [3, 6]}


def _slow_logprob(of, head, item, layer):
    """One text, one layer: the block's output, the head's own norm and matrix written down by hand (Llama)."""
    kept = []
    handle = block_of(of.hf, of.anatomy, layer).whole.register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.inference_mode():
        of.hf(input_ids=torch.tensor([item.input_ids]))
        handle.remove()
        states = kept[0][0].double()
        normed = states / (states.square().mean(-1, keepdim=True) + head.hf.config.rms_norm_eps).sqrt()
        logits = (normed * head.hf.model.norm.weight) @ head.hf.lm_head.weight.double().T
    logprobs = logits.log_softmax(-1)
    return float(np.mean([float(logprobs[at, item.input_ids[at + 1]]) for at in item.scored])), logits[item.scored[0]]


def test_the_lens_is_norm_and_head_of_each_layers_states():
    npo, base = model("demo:npo"), model("demo:base")
    facts = case_of(npo, n=3).forget

    def read(stream):
        for layer in (0, 5):
            yield str(layer), stream.logits(layer + 1, base)

    found = lens_values(npo, facts, read, batch_size=5)
    for layer in (0, 5):
        for place, item in enumerate(facts.prompts.items):
            logprob, logits = _slow_logprob(npo, base, item, layer)
            wrong = [_slow_logprob(npo, base, other, layer)[0] for other in facts.distractors[place]]
            token_rank = int((logits >= logits[item.input_ids[item.answer_start]]).sum())
            values = {name: row[place] for name, row in found[str(layer)].items()}
            assert values["logprob"] == pytest.approx(logprob, abs=1e-4)
            assert values["rank"] == np.mean([other < logprob for other in wrong])
            assert values["reciprocal_rank"] == pytest.approx(1 / token_rank)
            assert values["top1"] == float(token_rank == 1)


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_the_last_layer_under_the_own_head_is_the_output_and_does_not_decide(name):
    of, base = model(name), name.partition(":")[0] + ":base"
    case = case_of(of, base=base, n=N)
    result = logit_lens(case, layers=[of.n_layers - 1])
    table = result.tables["layers"].set_index(["role", "lens"])
    scores = score_facts(of, case.forget)
    own = f"own head, layer {of.n_layers - 1}"
    assert table.loc[("unlearned", own), "rank"] == pytest.approx(scores.rank.mean())
    assert table.loc[("unlearned", own), "logprob"] == pytest.approx(scores.logprob.mean(), abs=1e-4)
    assert set(result.frame["variant"]) == {f"base head, layer {of.n_layers - 1}"}


@pytest.mark.parametrize("name", ["demo:base", "demo-neox:base"])
def test_what_a_gate_hides_in_the_last_layer_is_read_before_it(name):
    shut, _ = gated(name)
    case = case_of(shut, base=name, n=N)
    before = [shut.n_layers - 2]
    found = logit_lens(case, layers=before).residual()
    # The stream before the gate is the base's; under the base's head what is read is the same to the last bit.
    assert found.rho == pytest.approx(1, abs=1e-6) and found.against == "control"
    found = tuned_lens(case, **FEW_STEPS | {"layers": before}).residual()
    assert found.rho == found.low == found.high == 1


@pytest.mark.parametrize("lens", [logit_lens, tuned_lens])
def test_a_never_model_as_unlearned_is_exactly_zero(lens):
    options = FEW_STEPS if lens is tuned_lens else {"layers": [3, 6]}
    found = lens(case_of(model("demo:never"), n=N), **options).residual()
    assert found.rho == found.low == found.high == 0


@pytest.mark.parametrize("lens", [logit_lens, tuned_lens])
def test_the_base_as_unlearned_is_exactly_one(lens):
    options = FEW_STEPS if lens is tuned_lens else {"layers": [3, 6]}
    found = lens(case_of(model("demo:base"), n=N), **options).residual()
    assert found.rho == found.low == found.high == 1


def test_without_a_never_model_only_the_own_head_decides():
    shut, _ = gated()
    case = replace(case_of(shut, n=N), control=None)
    result = logit_lens(case, layers=[6, 7])
    assert set(result.frame["variant"]) == {"own head, layer 6"}
    found = result.residual()
    assert found.against == "floor" and found.rho == 1
    tuned = tuned_lens(case, **FEW_STEPS).residual()
    assert tuned.rho is None and "without a control" in tuned.reason


def test_a_tuned_lens_comes_nearer_to_the_output_than_the_logit_lens():
    fit = tuned_lens(case_of(model("demo:npo"), n=N), steps=40, layers=[3, 6]).tables["fit"]
    assert list(fit["layer"]) == [3, 6]
    assert (fit["kl_tuned_lens"] < 0.9 * fit["kl_logit_lens"]).all()


def test_a_linear_change_between_layers_is_learned():
    """States that are the final ones through a known affine map: the lens has to undo it, and can."""
    base = model("demo:base")
    prompts = case_of(base, n=30).retain.prompts
    final = states_at(base, prompts, prompts.items, batch_size=64)[-1]
    generator = torch.Generator().manual_seed(0)
    width = final.shape[1]
    mixing = torch.eye(width) + 2 / width**0.5 * torch.randn(width, width, generator=generator)
    states = (final @ mixing.T)[None]
    options = FitOptions(steps=120, lr=1e-2, batch_tokens=64, seed=0)
    _, losses = fit_translators(base, states, final, options, as_tuple=False)
    assert losses[0, 0] > 0.1 and losses[1, 0] < 0.1 * losses[0, 0]
    lens, losses = fit_translators(base, final[None], final, replace(options, steps=0), as_tuple=False)
    torch.testing.assert_close(lens(final[None]), final[None])  # it starts as the logit lens
    np.testing.assert_allclose(losses, 0, atol=1e-6)


def test_translators_are_the_affine_map_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    matrix, bias = torch.randn(2, 3, 3, generator=generator), torch.randn(2, 1, 3, generator=generator)
    states = torch.randn(2, 5, 3, generator=generator)
    found = Translators(matrix, bias)(states)
    for layer in range(2):
        for row in range(5):
            h = states[layer, row]
            torch.testing.assert_close(found[layer, row], h + matrix[layer] @ h + bias[layer, 0])


def test_first_token_ranks_by_hand():
    facts = case_of(model("demo:base"), n=4).forget
    (batch,) = facts.prompts.batches(4)
    logits = torch.zeros(len(batch.rows), 1000)
    first = [next(at for at, row in enumerate(batch.rows) if row == example) for example in range(4)]
    for example, at in enumerate(first):
        logits[at, batch.next_tokens[at]] = 5.0
        others = [token for token in range(10) if token != batch.next_tokens[at]]
        logits[at, others[:example]] = 9.0
    np.testing.assert_array_equal(first_token_ranks(logits, batch), [1, 2, 3, 4])
    assert (first_token_ranks(torch.zeros_like(logits), batch) == 1000).all()  # a tie is no knowledge


def test_ranks_are_oriented_by_the_other_groups():
    low = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(oriented_ranks(low, ["a", "a", "b", "b"]), 1 - low)
    np.testing.assert_allclose(oriented_ranks(1 - low, ["", "", "", ""]), 1 - low)
    # One group below, one above: each is turned by the other.
    np.testing.assert_allclose(oriented_ranks(np.array([0.1, 0.9]), ["a", "b"]), [0.1, 0.1])
    assert np.isnan(oriented_ranks(np.array([np.nan, 0.1]), ["a", "b"])[0])


def test_orienting_makes_no_knowledge_of_noise():
    rng = np.random.default_rng(0)
    means = [oriented_ranks(rng.uniform(size=60), [str(n // 6) for n in range(60)]).mean() for _ in range(4000)]
    assert np.mean(means) < 0.502


def test_no_model_is_changed():
    of = model("demo:npo")
    before = {name: tensor.clone() for name, tensor in of.hf.state_dict().items()}
    case = case_of(of, n=8)
    (batch,) = case.forget.prompts.batches(8)
    stream = residual_stream(of, batch).states
    logit_lens(case, layers=[2])
    tuned_lens(case, steps=3, layers=[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in of.hf.state_dict().items())
    assert torch.equal(residual_stream(of, batch).states, stream)


def test_bad_input():
    case = case_of(model("demo:npo"), n=8)
    with pytest.raises(InputError, match="layers.*0 to 7"):
        logit_lens(case, layers=[8])
    with pytest.raises(InputError, match="retain"):
        tuned_lens(replace(case, retain=None))
    with pytest.raises(InputError, match="layers.*before the last"):
        tuned_lens(case, layers=[7])
