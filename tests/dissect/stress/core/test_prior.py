from dataclasses import replace

import numpy as np
import pytest

from dissect.stress.core.kinds import find_kinds
from dissect.stress.core.prior import answer_matrix, crossed, double_centred, ranks_of
from dissect.stress.core.scores import score_answers
from dissect.stress.core.subjects import read_questions
from tests.dissect.stress.constructed import model, questions

N = 60


def some_prompts():
    prompts = questions("forget")
    return replace(prompts, items=prompts.items[:N])


def ranks_by(scores):
    """Return the rank of every right answer by a function of question and answer, without priors."""
    prompts = some_prompts()
    asked = read_questions(prompts.items)
    kinds = find_kinds(asked)
    facts = crossed(prompts, asked, kinds, model("demo:base").tokenizer)
    several = zip(facts.prompts.items, facts.distractors, strict=True)
    given = np.array([scores(item) for right, others in several for item in (right, *others)])
    found = np.full(len(prompts), np.nan)
    for kind in kinds:
        centred = double_centred(answer_matrix(facts, kind, given))
        found[list(kind.indices)] = ranks_of(centred, kind.answers, np.ones(centred.shape, dtype=bool))
    return found


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


def test_a_model_that_gives_one_answer_to_everybody_has_a_rank_of_one_half():
    prior_of = {item.answer: hash(item.answer) % 97 for item in some_prompts().items}
    found = ranks_by(lambda item: prior_of[item.answer] + 3.0 * len(item.prompt))
    np.testing.assert_array_equal(found, np.full(N, 0.5))


def test_what_is_known_of_some_subjects_is_found_below_any_prior():
    items = some_prompts().items
    truth = {item.prompt: item.answer for item in items}
    known = {item.prompt for item in items[::3]}
    found = ranks_by(
        lambda item: 50.0 * (hash(item.answer) % 97) + (item.prompt in known and truth[item.prompt] == item.answer)
    )
    assert (found[::3] == 1).all()


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
