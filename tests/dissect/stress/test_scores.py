import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dissect.stress.alternatives import with_wrong_answers
from dissect.stress.scores import ranks, score_answers, score_facts
from tests.dissect.stress.constructed import model, questions


@pytest.fixture(scope="module")
def facts():
    return with_wrong_answers(questions("forget"), n=4).select(range(0, 240, 11))


def _slowly(of, item):
    """Mean log-probability and whether all tokens are the likeliest: one text, token by token."""
    with torch.inference_mode():
        logits = of.hf(input_ids=torch.tensor([item.input_ids])).logits[0].double()
    total, likeliest = 0.0, True
    for position in item.scored:
        token = item.input_ids[position + 1]
        total += float(logits[position].log_softmax(-1)[token])
        likeliest &= int(logits[position].argmax()) == token
    return total / len(item.scored), float(likeliest)


@pytest.mark.parametrize("name", ["demo:base", "demo:npo"])
def test_scores_are_those_of_one_text_at_a_time(facts, name):
    scores = score_facts(model(name), facts, batch_size=7)
    for place, item in enumerate(facts.prompts.items):
        logprob, likeliest = _slowly(model(name), item)
        wrong = [_slowly(model(name), other)[0] for other in facts.wrong[place]]
        assert scores.logprob[place] == pytest.approx(logprob, abs=1e-4)
        assert scores.correct[place] == likeliest
        assert scores.rank[place] == np.mean([logprob > other for other in wrong])


def test_batches_change_nothing(facts):
    one, many = (score_facts(model("demo:npo"), facts, batch_size=size) for size in (1, 64))
    np.testing.assert_allclose(one.logprob, many.logprob, atol=1e-5)
    np.testing.assert_array_equal(one.rank, many.rank)


def test_the_base_knows_and_the_never_model_guesses():
    facts = with_wrong_answers(questions("forget"))
    base, never = (score_facts(model(name), facts) for name in ("demo:base", "demo:never"))
    assert base.rank.mean() > 0.99 and base.correct.mean() > 0.95
    # 40 people: nearly two standard errors of a mean of ranks, each with a standard deviation of 1/sqrt(12).
    assert abs(never.rank.mean() - 0.5) < 0.06 and never.correct.mean() < 0.06


def test_ranks_by_hand():
    found = ranks(np.array([1.0, 2.0, 0.0]), np.array([0.5, 1.0, 3.0, 2.0]), [3, 1, 0])
    np.testing.assert_allclose(found[:2], [0.5, 0.5])
    assert np.isnan(found[2])


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 5))
def test_ranks_are_the_share_of_beaten_ones(wrong, right):
    found = ranks(np.full(len(wrong), float(right)), np.concatenate(wrong).astype(float), [len(w) for w in wrong])
    expected = [np.mean([1.0 if w < right else 0.5 if w == right else 0.0 for w in of_fact]) for of_fact in wrong]
    np.testing.assert_allclose(found, expected)


def test_no_answers_at_all_is_no_error():
    prompts = questions("forget")
    logprob, correct = score_answers(model("demo:base"), prompts, [])
    assert len(logprob) == len(correct) == 0
