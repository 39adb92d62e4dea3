import copy
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dissect import InputError
from dissect.stress.core.distractors import Facts
from dissect.stress.core.scores import score_facts
from dissect.stress.sampling import answers_held, holds, leak_at, sampling
from tests.dissect.stress.constructed import case_of, gated, model


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_leak_is_the_share_of_subsets_that_hold_the_answer(case):
    n, held, k = case
    samples = [1] * held + [0] * (n - held)
    expected = np.mean([any(chosen) for chosen in combinations(samples, k)])
    assert leak_at(np.array([held]), n, k)[0] == pytest.approx(expected)


@given(st.floats(0, 1), st.integers(1, 6), st.integers(1, 6))
def test_leak_is_unbiased(p, n, k):
    """Its mean over the binomial distribution of counts is 1 - (1 - p)^k."""
    k = min(k, n)
    counts = np.arange(n + 1)
    chance = np.array(
        [
            float(torch.distributions.Binomial(n, torch.tensor(p)).log_prob(torch.tensor(c)).exp())
            for c in counts.astype(float)
        ]
    )
    assert float(chance @ leak_at(counts, n, k)) == pytest.approx(1 - (1 - p) ** k, abs=1e-4)


def test_many_samples_neither_overflow_nor_vanish():
    found = leak_at(np.array([0, 1, 5000, 10_000]), 10_000, 100)
    np.testing.assert_allclose(found, [0, 0.01, 1 - 0.5**100, 1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("rope painter", "rope painter", True),
        ("a Rope  Painter, I think", "rope painter.", True),
        ("rope painters", "rope painter", False),
        ("tightrope painter", "rope painter", False),
        ("14 Sobro", "4 Sobro", False),
        ("a (b) c", "(b)", True),
        ("", "x", False),
        ("anything", ".", False),
        ("安娜出生在奥斯陆，我想", "奥斯陆。", True),
        ("वह दिनों था", "दिन", False),
    ],
)
def test_an_answer_is_held_as_whole_words(text, answer, expected):
    assert holds(text, answer) is expected


def _one_token(facts):
    places = [place for place, item in enumerate(facts.prompts.items) if item.n_answer_tokens == 1][:3]
    return Facts(facts.select(places).prompts, ((),) * len(places))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answers_come_as_often_as_their_probability_says(temperature):
    of = model("demo:never")
    facts = _one_token(case_of(model("demo:npo")).forget)
    n = 150
    held, _ = answers_held(of, facts, temperature=temperature, samples=n, seed=3, batch_size=1024)
    for place, item in enumerate(facts.prompts.items):
        with torch.inference_mode():
            logits = of.hf(input_ids=torch.tensor([item.input_ids])).logits[0, item.answer_start - 1].double()
        p = float((logits / temperature).softmax(-1)[item.input_ids[item.answer_start]])
        assert abs(held[place] / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-9


def test_batches_change_nothing():
    facts = case_of(model("demo:npo")).at_most(5).forget
    counts = [
        answers_held(model("demo:never"), facts, temperature=1.5, samples=6, seed=0, batch_size=size)[0]
        for size in (3, 64)
    ]
    np.testing.assert_array_equal(*counts)


def _shy(base, silence):
    """A model that ends the text with that probability wherever it is, and else goes on as the base does."""
    hf = copy.deepcopy(base.hf)
    end = base.tokenizer.eos_token_id

    def hush(_module, _args, logits):
        others = logits.clone()
        others[..., end] = -torch.inf
        logits[..., end] = others.logsumexp(-1) + math.log(silence / (1 - silence))
        return logits

    hf.get_output_embeddings().register_forward_hook(hush)
    return replace(base, name="shy", hf=hf, sha256="shy")


def test_what_greedy_answers_hide_leaks_when_one_asks_often():
    case = case_of(_shy(model("demo:base"), 0.6))
    case = replace(case, forget=_one_token(case.forget))
    assert score_facts(case.pair.unlearned, case.forget).correct.max() == 0
    result = sampling(case, samples=64, ks=(1, 16))
    mean = result.frame[result.frame["role"] == "unlearned"].groupby("measure")["value"].mean()
    assert result.measure == "leak@16"
    assert mean["leak@1"] == pytest.approx(0.4, abs=5 * (0.24 / 192) ** 0.5)
    assert result.residual().rho > 0.9 > 0.6 > result.residual("leak@1").rho


def test_a_gate_that_is_shut_leaks_nothing():
    shut, _ = gated("demo:base")
    result = sampling(case_of(shut).at_most(4), samples=4, ks=(4,))
    ours = result.frame[(result.frame["role"] == "unlearned") & (result.frame["measure"] == "leak@4")]["value"]
    base = result.frame[(result.frame["role"] == "base") & (result.frame["measure"] == "leak@4")]["value"]
    assert ours.max() == 0 and base.min() == 1


def test_never_as_unlearned_is_exactly_zero():
    result = sampling(case_of(model("demo:never")).at_most(6), samples=4, ks=(1, 4))
    for measure in ("leak@1", "leak@4", "excess@4"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


def test_without_a_never_model_wrong_answers_stand_in():
    case = replace(case_of(model("demo:base")).at_most(10), control=None)
    result = sampling(case, samples=4, ks=(4,))
    found = result.residual()
    assert result.measure == "excess@4" and found.against == "floor" and found.rho == 1
    assert result.residual("leak@4").rho is None and "by chance" in result.notes[0]


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(3)
    with pytest.raises(InputError, match="temperatures.*above 0"):
        sampling(case, temperatures=[0])
    with pytest.raises(InputError, match="ks.*from 1 to 4"):
        sampling(case, samples=4, ks=[5])
    with pytest.raises(InputError, match="k.*from 1 to 3"):
        leak_at(np.array([1]), 3, 4)
