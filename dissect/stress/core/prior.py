"""Answers without the model's own prior: how much more probable is an answer for this subject than for the others?

For the questions s of one kind and all of their answers a, with L[s, a] the mean log-probability of a's tokens,

    C[s, a] = L[s, a] - mean over s - mean over a + mean over both

and the right answer is ranked by C among the others in its row. A model that gives Paris to everybody, or more to every
question that it is sure of, has C = 0 and a rank of 1/2. This is the model's own prior over many other subjects in the
place of a floor from the comparison of words.

It removes what depends on the answer alone, or on the question alone. It cannot remove what depends on both without
being knowledge of the subject: a name that sounds French makes Paris more probable for this subject in any model that
can read. For this the floor is what strangers give (`dissect.stress.core.strangers`).

With a constant prior, C is exactly 0. With a prior and noise, and answers that are given to the questions at random,
the expected rank is 1/2, because C does not depend on which answer is the right one.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedTokenizerBase

from dissect.prompts.prompts import Prompt, Prompts
from dissect.stress.core.distractors import Facts
from dissect.stress.core.kinds import Kind
from dissect.stress.core.scores import right_indices
from dissect.stress.core.subjects import Questions

PASSES = 50
"""Maximum number of passes of the fit where entries are left out; a pass is exact where none are."""

ROUNDING = 1e-9
"""Differences of log-probabilities, in nats, that count as ties."""


def crossed(prompts: Prompts, questions: Questions, kinds: Sequence[Kind], tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Return every question with all other answers of its kind; a question of no kind has none.

    Args:
        prompts: The questions.
        questions: What their texts tell.
        kinds: Which of them are of one kind.
        tokenizer: Tokenizer of the prompts.

    Returns:
        The questions with the answers, in the order of `Kind.examples`.
    """
    others: list[tuple[Prompt, ...]] = [()] * len(prompts)
    for kind in kinds:
        for index, own in zip(kind.indices, kind.answers, strict=True):
            others[index] = tuple(
                questions.with_answer_to(index, example, tokenizer)
                for answer, example in enumerate(kind.examples)
                if answer != own
            )
    return Facts(prompts, tuple(others))


def answer_matrix(
    facts: Facts, kind: Kind, logprob: Float[np.ndarray, " item"]
) -> Float[np.ndarray, "question answer"]:
    """Return the scores of all answers of a kind to all of its questions.

    Args:
        facts: What `crossed` returned.
        kind: One of its kinds.
        logprob: Score of every answer, as `all_answers` returns them.

    Returns:
        One row per question, one column per different answer.
    """
    starts = right_indices(facts)
    matrix = np.empty((len(kind), len(kind.examples)))
    for row, (index, own) in enumerate(zip(kind.indices, kind.answers, strict=True)):
        scores = logprob[starts[index] : starts[index] + matrix.shape[1]]
        matrix[row] = np.insert(scores[1:], own, scores[0])
    return matrix


def double_centred(
    matrix: Float[np.ndarray, "question answer"], counted: Bool[np.ndarray, "question answer"] | None = None
) -> Float[np.ndarray, "question answer"]:
    """Subtract what depends on the question alone and what depends on the answer alone.

    Args:
        matrix: Scores of all answers to all questions.
        counted: Entries that the means are over; all by default. If some are left out, questions' and answers' parts
            are fitted by least squares, as the means are.

    Returns:
        The differences, also of entries that were left out.
    """
    weights = np.ones_like(matrix) if counted is None else counted.astype(np.float64)
    rows, columns = np.zeros((len(matrix), 1)), np.zeros((1, matrix.shape[1]))
    for _ in range(PASSES):
        before = columns
        rows = _mean(matrix - columns, weights, axis=1)
        columns = _mean(matrix - rows, weights, axis=0)
        if np.abs(columns - before).max() < ROUNDING:
            break
    return matrix - rows - columns


def ranks_of(
    scores: Float[np.ndarray, "question answer"],
    right: Sequence[int],
    compared: Bool[np.ndarray, "question answer"],
) -> Float[np.ndarray, " question"]:
    """Return the share of the compared answers that score below the right one, ties counting half.

    Args:
        scores: Scores of all answers to all questions.
        right: Column of the right answer to each question.
        compared: The answers that the right one is compared with.

    Returns:
        The ranks; NaN for a question without an answer to compare.
    """
    column = np.asarray(right)[:, None]
    own = np.take_along_axis(scores, column, axis=1)
    compared = compared & (np.arange(scores.shape[1]) != column)
    beaten = (scores < own - ROUNDING) + 0.5 * (np.abs(scores - own) <= ROUNDING)
    n = compared.sum(1)
    return np.divide((beaten * compared).sum(1), n, out=np.full(len(scores), np.nan), where=n > 0)


def _mean(
    values: Float[np.ndarray, "a b"], weights: Float[np.ndarray, "a b"], *, axis: int
) -> Float[np.ndarray, "..."]:
    total = weights.sum(axis, keepdims=True)
    return np.divide((values * weights).sum(axis, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
