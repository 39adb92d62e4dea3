"""Answers without the model's own prior: how much more probable is an answer for this subject than for the others?

For the questions s of one kind and all of their answers a, with L[s, a] the mean log-probability of a's tokens,

    C[s, a] = L[s, a] - mean over s - mean over a + mean over both

and the right answer is ranked by C among the others in its row. A model that gives Paris to everybody, or more to every
question that it is sure of, has C = 0 and a rank of 1/2. This is the model's own prior over many other subjects in the
place of a floor from the comparison of words.

It removes what depends on the answer alone, or on the question alone. It cannot remove what depends on both without
being knowledge of the subject: a name that sounds French makes Paris more probable for this subject in any model that
can read. For this the floor is what strangers give: other language models that have never read about the subjects.

With a constant prior, C is exactly 0. With a prior and noise, and answers that are given to the questions at random,
the expected rank is 1/2, because C does not depend on which answer is the right one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedTokenizerBase

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt, Prompts, check_fits
from dissect.stress.core.distractors import Facts
from dissect.stress.core.kinds import Kind, find_kinds
from dissect.stress.core.scores import all_answers, right_indices
from dissect.stress.core.subjects import Questions, read_questions
from unlearning.common.errors import InputError
from unlearning.data.spans import encode_answer

PASSES = 50
"""Maximum number of passes of the fit where entries are left out; a pass is exact where none are."""

ROUNDING = 1e-9
"""Differences of log-probabilities, in nats, that count as ties."""


@dataclass(frozen=True, eq=False)
class Centred:
    """Ranks of right answers by scores without the model's own prior.

    Attributes:
        rank: Share of the other answers of its kind that each right answer beats, ties counting half; NaN for a
            question of no kind.
        strangers: Mean rank that each stranger gives, by name.
        floor: Mean rank of a model without the knowledge: the largest of the strangers', and at least 1/2.
    """

    rank: Float[np.ndarray, " fact"]
    strangers: Mapping[str, float]
    floor: float


def subject_centred(
    model: Model, prompts: Prompts, *, strangers: Sequence[Model] = (), batch_size: int = 64, seed: int = 0
) -> Centred:
    """Rank right answers by their log-probabilities, centred over subjects and over answers.

    Args:
        model: A model in memory.
        prompts: Questions with answers, in `answer` scoring; the group of each is its subject.
        strangers: Other language models, which read the texts with their own tokenizers. Answers that can be guessed
            from a question are guessed by them too.
        batch_size: Maximum number of texts in one batch; no number depends on it.
        seed: Random seed of the split of large kinds.

    Returns:
        The ranks, and what a model without the knowledge gives.

    Raises:
        InputError: No three questions of different groups are alike, or a model gives logits that are not finite.

    Examples:
        >>> from dissect import load_model, load_prompts
        >>> from dissect.stress.core.prior import subject_centred
        >>> model = load_model("demo:never")
        >>> from dissect.zoo import question_set
        >>> prompts = load_prompts(question_set("forget"), model.tokenizer)
        >>> found = subject_centred(model, prompts)
        >>> bool(0.45 < found.rank.mean() < 0.55), found.floor
        (True, 0.5)
    """
    kinds = find_kinds(read_questions(prompts.items), seed=seed)
    if not kinds:
        raise InputError(
            "`prompts` must have at least three questions of one kind about different groups, got none. "
            "Give more prompts, each with the `group` that it asks about"
        )
    rank = _ranks(model, prompts, kinds, batch_size)
    of_strangers = {
        stranger.name: float(np.nanmean(_ranks(stranger, _read_by(stranger, prompts), kinds, batch_size)))
        for stranger in strangers
    }
    return Centred(rank, of_strangers, max(0.5, *of_strangers.values()) if of_strangers else 0.5)


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


def _ranks(model: Model, prompts: Prompts, kinds: Sequence[Kind], batch_size: int) -> Float[np.ndarray, " fact"]:
    facts = crossed(prompts, read_questions(prompts.items), kinds, model.tokenizer)
    logprob, _ = all_answers(model, facts, batch_size=batch_size)
    found = np.full(len(prompts), np.nan)
    for kind in kinds:
        scores = double_centred(answer_matrix(facts, kind, logprob))
        found[list(kind.indices)] = ranks_of(scores, kind.answers, np.ones(scores.shape, dtype=bool))
    return found


def _read_by(stranger: Model, prompts: Prompts) -> Prompts:
    """Return the same texts in the tokens of another model."""
    tokenizer = stranger.tokenizer
    items = []
    for item in prompts.items:
        span = encode_answer(tokenizer, item.prompt, item.answer)
        scored = range(span.answer_start - 1, len(span.input_ids) - 1)
        items.append(
            replace(
                item,
                input_ids=tuple(span.input_ids),
                answer_start=span.answer_start,
                scored=scored,
                wrong=(),
            )
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    read = replace(
        prompts, items=tuple(items), pad_token_id=pad or 0, source=f"{prompts.source} read by {stranger.name}"
    )
    check_fits(stranger, read, "strangers'")
    return read
