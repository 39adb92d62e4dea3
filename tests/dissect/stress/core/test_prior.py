from dataclasses import replace

import numpy as np
import pytest

from dissect import InputError
from dissect.stress.core import prior
from dissect.stress.core.kinds import find_kinds
from dissect.stress.core.prior import answer_matrix, crossed, double_centred, ranks_of, subject_centred
from dissect.stress.core.scores import score_answers
from dissect.stress.core.subjects import read_questions
from tests.dissect.stress.constructed import model, questions

N = 60


def some_prompts():
    prompts = questions("forget")
    return replace(prompts, items=prompts.items[:N])


def scored_by(monkeypatch, scores):
    """Let models score answers by a function of the model's name, the question and the answer."""

    def all_answers(of, facts, *, batch_size):  # noqa: ARG001
        asked = [(right, *others) for right, others in zip(facts.prompts.items, facts.distractors, strict=True)]
        items = [item for answers in asked for item in answers]
        return np.array([scores(of.name, item) for item in items]), np.zeros(len(items))

    monkeypatch.setattr(prior, "all_answers", all_answers)


def test_every_answer_of_a_kind_is_scored_for_every_question():
    prompts = some_prompts()
    questions = read_questions(prompts.items)
    kinds = find_kinds(questions)
    facts = crossed(prompts, questions, kinds, model("demo:base").tokenizer)
    asked = [(right, *others) for right, others in zip(prompts.items, facts.distractors, strict=True)]
    items = [item for answers in asked for item in answers]
    number = {(item.prompt, item.answer): float(at) for at, item in enumerate(items)}
    for kind in kinds:
        matrix = answer_matrix(facts, kind, np.arange(len(items), dtype=np.float64))
        for row, index in enumerate(kind.indices):
            for column, example in enumerate(kind.examples):
                assert matrix[row, column] == number[prompts.items[index].prompt, prompts.items[example].answer]
    # The tokens are those of the answer, wherever it came from.
    logprob, _ = score_answers(model("demo:base"), prompts, items[:3])
    assert logprob[0] > logprob[1:].max()


def test_a_model_that_gives_one_answer_to_everybody_has_a_rank_of_one_half(monkeypatch):
    prior_of = {item.answer: hash(item.answer) % 97 for item in some_prompts().items}
    scored_by(monkeypatch, lambda _, item: prior_of[item.answer] + 3.0 * len(item.prompt))
    found = subject_centred(model("demo:base"), some_prompts())
    np.testing.assert_array_equal(found.rank, np.full(N, 0.5))
    assert found.floor == 0.5 and found.strangers == {}


def test_what_is_known_of_some_subjects_is_found_below_any_prior(monkeypatch):
    items = some_prompts().items
    truth = {item.prompt: item.answer for item in items}
    known = {item.prompt for item in items[::3]}
    scored_by(
        monkeypatch,
        lambda _, item: 50.0 * (hash(item.answer) % 97) + (item.prompt in known and truth[item.prompt] == item.answer),
    )
    found = subject_centred(model("demo:base"), some_prompts())
    assert (found.rank[::3] == 1).all()


def test_strangers_who_guess_the_answers_raise_the_floor(monkeypatch):
    truth = {item.prompt: item.answer for item in some_prompts().items}
    rng = np.random.default_rng(0)

    def scores(name, item):
        return float(rng.normal() + (3.0 if name == "demo:npo" and truth[item.prompt] == item.answer else 0.0))

    scored_by(monkeypatch, scores)
    found = subject_centred(model("demo:base"), some_prompts(), strangers=[model("demo:npo"), model("demo:never")])
    assert found.floor == found.strangers["demo:npo"] > 0.8 > 0.6 > found.strangers["demo:never"]


def test_a_stranger_reads_the_same_texts():
    found = subject_centred(model("demo:base"), some_prompts(), strangers=[model("demo:never")])
    alone = subject_centred(model("demo:never"), some_prompts())
    assert found.strangers["demo:never"] == pytest.approx(np.nanmean(alone.rank))
    assert found.rank.mean() > 0.99 and abs(np.nanmean(alone.rank) - 0.5) < 0.12


@pytest.mark.parametrize("left_out", [0, 5])
def test_centring_is_least_squares(left_out):
    rng = np.random.default_rng(1)
    matrix, counted = rng.normal(size=(6, 5)), np.ones((6, 5), dtype=bool)
    counted[np.arange(left_out), np.arange(left_out)] = False
    design = np.array([[*np.eye(6)[row], *np.eye(5)[column]] for row in range(6) for column in range(5)])
    fit = np.linalg.lstsq(design[counted.ravel()], matrix[counted], rcond=None)[0]
    np.testing.assert_allclose(double_centred(matrix, counted), matrix - (design @ fit).reshape(6, 5), atol=1e-6)


def test_ranks_count_ties_half_and_compare_only_what_is_asked():
    scores = np.array([[1.0, 0.0, 1.0, 2.0], [0.0, 5.0, 1.0, 1.0]])
    every = np.ones((2, 4), dtype=bool)
    np.testing.assert_array_equal(ranks_of(scores, [0, 1], every), [0.5, 1.0])
    every[0, 3] = False
    np.testing.assert_array_equal(ranks_of(scores, [0, 1], every), [0.75, 1.0])
    assert np.isnan(ranks_of(scores, [0, 1], np.eye(2, 4, dtype=bool))).all()


def test_questions_that_are_not_alike_are_refused():
    prompts = replace(some_prompts(), items=some_prompts().items[:6])  # one person
    with pytest.raises(InputError, match="three questions of one kind"):
        subject_centred(model("demo:base"), prompts)
