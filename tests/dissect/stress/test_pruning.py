import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from dissect import InputError
from dissect.coefficients.hooks import down_projections, edited_logits, scored_coefficients
from dissect.coefficients.neurons import value_vectors
from dissect.models.model import Model
from dissect.stress import pruning
from dissect.stress.pruning import (
    neuron_change,
    own_answers,
    prune_changed,
    prune_important,
    snip_scores,
    without_neurons,
    without_weights,
)
from tests.dissect.stress.constructed import case_of, gated, model

N = 12


@pytest.fixture(scope="module")
def npo():
    return case_of(model("demo:npo"), n=N)


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_the_gate_is_the_most_changed_neuron_and_pruning_it_brings_everything_back(name):
    shut, gate = gated(name)
    case = case_of(shut, base=name, n=N)
    change = neuron_change(case.pair.base, shut, case.forget.prompts)
    place = np.unravel_index(int(change.argmax()), change.shape)
    assert place == (gate.layer, gate.neuron)
    result = prune_changed(case, counts=(1,))
    means = result.frame.query("measure == 'correct'").groupby(["role", "variant"])["value"].mean()
    assert means["unlearned", ""] == 0
    assert means["unlearned", "top 1"] >= means["base", ""] - 0.05 > 0.8
    found = result.residual()
    assert found.rho > 0.9 and found.low > 0.5 and result.level == 4
    # Any other neuron does nothing.
    assert (result.tables["random"].query("role == 'unlearned'")["correct"] == 0).all()


def test_the_never_model_as_unlearned_has_no_residual():
    case = case_of(model("demo:never"), n=N)
    for result in (prune_changed(case, counts=(8,)), prune_important(case, shares=((5, 5),), n_texts=2)):
        found = result.residual()
        assert found.rho == found.low == found.high == 0


def test_change_is_the_length_of_what_a_neurons_part_moved_by(npo):
    base, other, prompts = npo.pair.base, npo.pair.unlearned, npo.forget.prompts
    found = neuron_change(base, other, prompts, batch_size=5)
    for layer in (0, base.n_layers - 1):
        (batch,) = prompts.batches(len(prompts))
        ours, theirs = (scored_coefficients(of, batch)[layer].double() for of in (base, other))
        v_b, v_u = (value_vectors(of, layer).double() for of in (base, other))
        for neuron in (0, 17, 351):
            parts = theirs[:, neuron, None] * v_u[neuron] - ours[:, neuron, None] * v_b[neuron]
            lengths = parts.norm(dim=-1)
            by_fact = [lengths[batch.rows == row].mean() for row in range(len(prompts))]
            assert float(found[layer, neuron]) == pytest.approx(float(torch.stack(by_fact).mean()), rel=1e-3, abs=1e-5)
    assert not neuron_change(base, base, prompts).any()


def test_a_pruned_neuron_writes_what_one_with_coefficient_zero_writes(npo):
    of = npo.pair.unlearned
    before = {name: value.clone() for name, value in of.hf.named_parameters()}
    chosen = torch.zeros(of.n_layers, value_vectors(of, 0).shape[0], dtype=torch.bool)
    chosen[2, [3, 5]] = chosen[7, 11] = True
    after = without_neurons(of, chosen)
    (batch,) = npo.forget.prompts.batches(N)
    expected = edited_logits(of, batch, lambda layer, m: m.masked_fill(chosen[layer], 0))
    torch.testing.assert_close(edited_logits(after, batch), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in of.hf.named_parameters())
    changed = {name for name, value in after.hf.named_parameters() if not torch.equal(value, before[name])}
    assert len(changed) == 2 and after.sha256 != of.sha256


def test_value_vectors_are_rows_in_conv1d():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=1000, n_positions=32))
    gpt2 = Model.wrap(hf, model("demo:base").tokenizer, name="gpt2")
    chosen = torch.zeros(1, 64, dtype=torch.bool)
    chosen[0, 9] = True
    weight = down_projections(without_neurons(gpt2, chosen))[0].weight
    assert not weight[9].any() and torch.equal(weight[10], hf.transformer.h[0].mlp.c_proj.weight[10])
    assert not value_vectors(without_neurons(gpt2, chosen), 0)[9].any()


def test_snip_scores_are_weights_times_slopes(npo):
    """Against differences of the loss, in float64, one text at a time."""
    wide = replace(npo.pair.unlearned, hf=copy.deepcopy(npo.pair.unlearned.hf).double())
    prompts = replace(npo.forget.prompts, items=npo.forget.prompts.items[:3])
    scores = snip_scores(wide, prompts)
    assert len(scores) == 7 * wide.n_layers

    def loss(item):
        logits = wide.hf(input_ids=torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
        return -np.mean([float(logits[at, item.input_ids[at + 1]]) for at in item.scored])

    for name in list(scores)[:: len(scores) // 3]:
        weight = wide.hf.get_parameter(name).data
        row, column = divmod(int(scores[name].argmax()), weight.shape[1])
        kept, step, total = float(weight[row, column]), 1e-3, 0.0  # its norms are float32 inside
        for item in prompts.items:
            with torch.inference_mode(mode=False), torch.no_grad():
                weight[row, column] = kept + step
                above = loss(item)
                weight[row, column] = kept - step
                below = loss(item)
                weight[row, column] = kept
            total += abs(kept * (above - below) / (2 * step)) / len(prompts)
        assert float(scores[name][row, column]) == pytest.approx(total, rel=1e-2)


def test_no_gradient_is_left_in_the_model(npo):
    of = npo.pair.unlearned
    snip_scores(of, replace(npo.forget.prompts, items=npo.forget.prompts.items[:1]))
    assert all(value.grad is None for value in of.hf.parameters())


def test_a_models_own_answers_are_its_likeliest_tokens(npo):
    of = npo.pair.unlearned
    for item, answered in zip(npo.forget.prompts.items, own_answers(of, npo.forget).items, strict=True):
        ids = list(item.input_ids[: item.answer_start])
        while len(ids) < len(item.input_ids):
            ids.append(int(of.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(answered.input_ids) == ids and answered.scored == item.scored
    base = npo.pair.base
    right = [item.input_ids for item in npo.forget.prompts.items]
    assert [item.input_ids for item in own_answers(base, npo.forget).items] == right  # which it knows


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 100), st.integers(0, 99))
def test_the_top_share_is_the_highest_scores(rows, columns, per_cent, seed):
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(rows * columns).reshape(rows, columns)).float()
    found = pruning._top(scores, per_cent)
    n = max(1, round(rows * columns * per_cent / 100))
    assert {float(score) for score in scores[found]} == set(range(rows * columns - n, rows * columns))


def test_what_matters_to_retain_questions_is_kept(npo, monkeypatch):
    pruned = []

    def spy(of, chosen):
        pruned.append((of.name, {name: mask.clone() for name, mask in chosen.items()}))
        return without_weights(of, chosen)

    monkeypatch.setattr(pruning, "without_weights", spy)
    result = prune_important(npo, shares=((5, 10),), n_texts=4)
    of = npo.pair.unlearned
    forget, retain = (
        snip_scores(of, own_answers(of, facts.select([0, 4, 7, 11]))) for facts in (npo.forget, npo.retain)
    )
    (name, chosen), (_, random) = pruned[:2]
    assert name == of.name and chosen.keys() == forget.keys()
    for key, mask in chosen.items():
        kept_below = retain[key].flatten().kthvalue(round(0.9 * mask.numel())).values
        assert (retain[key][mask] <= kept_below).all()
        matters = forget[key].flatten().kthvalue(round(0.95 * mask.numel())).values
        assert (forget[key][mask] >= matters).all()
        expected = (forget[key] > matters) & (retain[key] <= kept_below)
        assert (mask != expected).sum() <= 2  # ties and rounding at the border
        assert random[key].sum() == mask.sum() and not torch.equal(random[key], mask)
    share = result.tables["pruned"].set_index("role").loc["unlearned", "share"]
    assert share == pytest.approx(sum(int(m.sum()) for m in chosen.values()) / sum(m.numel() for m in chosen.values()))
    assert set(result.frame["variant"]) == {"", "q 5 %, p 10 %"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda case: prune_changed(case, counts=()), "counts.*none"),
        (lambda case: prune_changed(case, counts=(0,)), "from 1 to 2816"),
        (lambda case: prune_changed(case, counts=(9999,)), "from 1 to 2816"),
        (lambda case: prune_changed(case, counts=(3, 3)), "different numbers"),
        (lambda case: prune_important(replace(case, retain=None)), "needs retain prompts"),
        (lambda case: prune_important(case, shares=()), "different pairs"),
        (lambda case: prune_important(case, shares=((0, 5),)), "above 0 and up to 100"),
    ],
)
def test_bad_input_is_refused_in_one_line(npo, call, match):
    with pytest.raises(InputError, match=match) as refused:
        call(npo)
    assert "\n" not in str(refused.value)
