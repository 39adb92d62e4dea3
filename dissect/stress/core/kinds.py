"""Questions of one kind, found from their texts, and derangements of their answers.

Two questions are of one kind if their wording without the subject's own words is the same: "Where was Ann Lee born?"
and "Where was Bo Ek born?" (`dissect.stress.core.subjects`). Questions whose wording does not repeat are put together
by the Jaccard index of the words that are left and by the lengths of the answers.

A kind has at most one question of every group. Then, if answers are shuffled among the questions of a kind, every
answer goes to another group.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dissect.stress.core.distractors import jaccard
from dissect.stress.core.subjects import Questions

LARGEST = 24
"""Maximum number of questions of a kind. More questions are split at random, to bound the number of candidates."""

SMALLEST = 3
"""Minimum number: the right answer, the answer that is taught in its place, and one to compare the right one with."""

SIMILAR = 8
"""Number of questions that are put together by similarity."""

TRIES = 100
"""Number of derangements that are drawn before a kind is given up."""


@dataclass(frozen=True)
class Kind:
    """Questions that ask the same of different subjects.

    Attributes:
        indices: Indices of the questions among the prompts.
        answers: For each of them, the number of its answer among the different answers of the kind.
        examples: For each different answer, the index of a question that has it.
    """

    indices: tuple[int, ...]
    answers: tuple[int, ...]
    examples: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.indices)

    @property
    def times(self) -> list[int]:
        """For each different answer, the number of questions that have it."""
        counts = Counter(self.answers)
        return [counts[answer] for answer in range(len(self.examples))]


def find_kinds(questions: Questions, *, seed: int = 0) -> list[Kind]:
    """Put questions of one kind together.

    Args:
        questions: The questions.
        seed: Random seed of the split of large kinds.

    Returns:
        Kinds of at least `SMALLEST` questions, each of another subject. A question can be of no kind.

    Examples:
        >>> from dissect import load_model, load_prompts
        >>> from dissect.stress.core.kinds import find_kinds
        >>> from dissect.stress.core.subjects import read_questions
        >>> from dissect.zoo import question_set
        >>> prompts = load_prompts(question_set("forget"), load_model("demo:base").tokenizer)
        >>> {len(kind) for kind in find_kinds(read_questions(prompts.items))}  # six questions about 40 people, halved
        {20}
    """
    drawn = np.random.default_rng(seed)
    of_template: dict[tuple[str, ...], list[int]] = {}
    for index, template in enumerate(questions.templates):
        of_template.setdefault(template, []).append(index)
    parts: list[list[int]] = []
    left: list[int] = []
    for indices in of_template.values():
        for several in _one_per_subject(indices, questions.subjects):
            if len(several) < SMALLEST:
                left += several
                continue
            order = [several[number] for number in drawn.permutation(len(several))]
            n = -(-len(order) // LARGEST)
            parts += [sorted(order[number::n]) for number in range(n)]
    parts += _similar(sorted(left), questions)
    return [_kind(sorted(indices), questions.answers) for indices in parts]


def similar_questions(questions: Questions) -> Float[np.ndarray, "n n"]:
    """Return how alike questions are: Jaccard index of their words, times the ratio of the lengths of their answers.

    Args:
        questions: The questions; the words of their subjects do not count.

    Returns:
        Numbers from 0 to 1, or 2 to 3 for questions of the same wording, which are more alike than any others.
    """
    same = np.array([[a == b for b in questions.templates] for a in questions.templates])
    return _similarity(questions, range(len(questions.items))) + 2.0 * same


def derangement(kind: Kind, questions: Questions, generator: np.random.Generator) -> tuple[int, ...] | None:
    """Draw an assignment of the answers of a kind to its questions that gives no question an answer of its subject.

    Questions are put in a random order, in which those of one answer stand together, and every question gets the answer
    that stands some places further on. An answer is given as often as it is right. All that is drawn is the same
    if answers that are right equally often are exchanged, so such answers are exchangeable.

    Args:
        kind: The questions of the kind.
        questions: All questions.
        generator: Generator of the random order.

    Returns:
        For each question of the kind, the number of the answer that it is given; None if none was found.
    """
    n, most = len(kind), max(kind.times)
    if 2 * most > n:
        return None
    for _ in range(TRIES):
        order, of_answer = (generator.permutation(size).tolist() for size in (n, len(kind.examples)))
        given = shifted(kind, order, of_answer, int(generator.integers(most, n - most + 1)))
        texts = [questions.answers[kind.examples[answer]] for answer in given]
        if not any(text in questions.own[index] for text, index in zip(texts, kind.indices, strict=True)):
            return given
    return None


def shifted(kind: Kind, order: Sequence[int], of_answer: Sequence[int], further: int) -> tuple[int, ...]:
    """Give every question the answer that stands some places further on.

    Args:
        kind: The questions.
        order: An order of the questions.
        of_answer: For each different answer, its place in an order of answers, which comes before that of questions.
        further: Number of places: no question keeps its answer if this is not less than the number of questions of the
            commonest answer, nor more than that of all others.

    Returns:
        For each question, the number of the answer that it is given.
    """
    places = sorted(order, key=lambda at: of_answer[kind.answers[at]])
    given = [0] * len(kind)
    for number, at in enumerate(places):
        given[at] = kind.answers[places[(number + further) % len(kind)]]
    return tuple(given)


def _one_per_subject(indices: Sequence[int], subjects: Sequence[str]) -> list[list[int]]:
    """Split questions so that no part has two of one subject."""
    parts: list[list[int]] = []
    seen: Counter[str] = Counter()
    for index in indices:
        number = seen[subjects[index]]
        seen[subjects[index]] += 1
        if number == len(parts):
            parts.append([])
        parts[number].append(index)
    return parts


def _similar(indices: Sequence[int], questions: Questions) -> list[list[int]]:
    """Put questions together that resemble each other most, each of another subject."""
    if not indices:
        return []
    alike = _similarity(questions, indices)
    other = np.array([[questions.subjects[a] != questions.subjects[b] for b in indices] for a in indices])
    free = np.ones(len(indices), dtype=bool)
    parts = []
    while free.sum() >= SMALLEST:
        nearest = [_nearest(at, alike, other, free) if free[at] else [] for at in range(len(indices))]
        best = max(nearest, key=lambda part: float(alike[part[0], part[1:]].mean()) if len(part) >= SMALLEST else -1.0)
        if len(best) < SMALLEST:
            break
        free[best] = False
        parts.append([indices[at] for at in best])
    return parts


def _nearest(
    at: int, alike: Float[np.ndarray, "n n"], other: Bool[np.ndarray, "n n"], free: Bool[np.ndarray, " n"]
) -> list[int]:
    """Return a question and the free ones that resemble it most, each of another subject."""
    part = [at]
    allowed = free & other[at]
    while len(part) < SIMILAR and allowed.any():
        chosen = int(np.where(allowed, alike[at], -1.0).argmax())
        part.append(chosen)
        allowed &= other[chosen]
    return part


def _similarity(questions: Questions, indices: Sequence[int]) -> Float[np.ndarray, "n n"]:
    sets = [frozenset(questions.templates[index]) - {""} for index in indices]
    lengths = np.array([max(1, len(questions.answers[index].split())) for index in indices], dtype=np.float64)
    ratio = np.minimum.outer(lengths, lengths) / np.maximum.outer(lengths, lengths)
    same = [[1.0 if a == b else jaccard(a, b) for b in sets] for a in sets]
    return np.array(same).reshape(ratio.shape) * ratio


def _kind(indices: Sequence[int], texts: Sequence[str]) -> Kind:
    numbers: dict[str, int] = {}
    examples = []
    for index in indices:
        if texts[index] not in numbers:
            numbers[texts[index]] = len(numbers)
            examples.append(index)
    return Kind(tuple(indices), tuple(numbers[texts[index]] for index in indices), tuple(examples))
