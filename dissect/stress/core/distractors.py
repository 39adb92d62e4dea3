"""Facts, and distractors: wrong answers that the right answer to each question is ranked among.

Distractors tell a model that knows the answer from one that only knows what answers look like. A model without the
knowledge gives the right answer and a distractor of the same kind the same probability on average, so the expected
share of distractors that are less probable than the right answer is 1/2, whatever training did to answers in general.
This holds for distractors that are the right answers to other questions, because each of them is right once. It need
not hold for distractors that somebody wrote: two models without the knowledge score 0.72 and 0.76 on TOFU's perturbed
answers, and 0.50 on the answers to other questions.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dissect.prompts.prompts import Prompt, Prompts
from unlearning.common.errors import InputError

N_DISTRACTORS = 8
"""Default number of distractors per question."""

_CANDIDATES = 1000
"""Maximum number of other questions whose answers are considered as distractors for one question."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Questions with their answers, and distractors for each.

    Attributes:
        prompts: The questions with their right answers.
        distractors: For each question, copies of its prompt in which a distractor replaces the right answer.
    """

    prompts: Prompts
    distractors: tuple[tuple[Prompt, ...], ...]

    def __len__(self) -> int:
        """Return the number of facts."""
        return len(self.prompts)

    @property
    def groups(self) -> list[str]:
        """The group of each fact."""
        return [item.group for item in self.prompts.items]

    @property
    def sha256(self) -> str:
        """Content hash of what is computed on: the questions, and the tokens of the distractors."""
        tokens = [[item.input_ids for item in distractors] for distractors in self.distractors]
        return hashlib.sha256(json.dumps([self.prompts.sha256, tokens]).encode()).hexdigest()

    def select(self, indices: Sequence[int]) -> "Facts":
        """Return the facts at these indices, with their distractors."""
        items = tuple(self.prompts.items[index] for index in indices)
        return Facts(replace(self.prompts, items=items), tuple(self.distractors[index] for index in indices))


def with_distractors(
    prompts: Prompts, *, from_file: bool = True, n: int = N_DISTRACTORS, seed: int = 0, name: str = "forget"
) -> Facts:
    """Find distractors: those that the file gives, else the answers to the most similar questions.

    Two questions are the more similar, the larger the share of their words that both contain (Jaccard index). If the
    prompts have groups, only questions of other groups are used. Ties are broken by the seed. No distractor equals the
    right answer, and none is used twice for one question.

    Args:
        prompts: Questions with answers, in `answer` scoring.
        from_file: Whether to use the distractors that the file gives. Their chance level is unknown without a control.
        n: Maximum number of distractors per question; fewer if the questions have fewer different answers.
        seed: Random seed of the order among equally similar questions.
        name: Name of the prompt set in messages, such as `forget`.

    Returns:
        The prompts with their distractors.

    Raises:
        InputError: The prompts have `notebook` scoring, or all have the same answer, or are all of one group.
    """
    if prompts.scoring != "answer":
        raise InputError(
            f"`scoring` of the {name} prompts must be 'answer', got {prompts.scoring!r}. "
            "Load them with scoring='answer'."
        )
    of_file = [_given(item, n) for item in prompts.items]
    given = any(of_file)
    if len({normal(item.answer) for item in prompts.items}) < 2 and not (from_file and given):
        have = "there is only one prompt, with the answer" if len(prompts) == 1 else "all have one answer"
        raise InputError(
            f"the {name} prompts must have at least two different answers, but {have} "
            f"{prompts.items[0].answer[:40]!r}: a model that knows it cannot be told from one that always says it. "
            "Give prompts with different answers"
            + (", or a `control`, with which the file's own distractors can be used." if given else ".")
        )
    words = [words_of(item) for item in prompts.items]
    order = sorted(range(len(prompts)), key=lambda index: zlib.crc32(f"{seed} {prompts.items[index].id}".encode()))
    position = {index: number for number, index in enumerate(order)}
    found = []
    for index, item in enumerate(prompts.items):
        if from_file and of_file[index]:
            found.append(of_file[index])
            continue
        # Every question starts at its own position, so that equally similar questions are not the same for all.
        candidates = [*order[position[index] + 1 :], *order[: position[index]]][:_CANDIDATES]
        allowed = [other for other in candidates if prompts.items[other].group != item.group or not item.group]
        allowed.sort(key=lambda other: -jaccard(words[index], words[other]))
        found.append(tuple(_different(item, [prompts.items[other] for other in allowed], n)))
    if not any(found):
        raise InputError(
            f"the {name} prompts must be of at least two groups, but all are of {prompts.items[0].group[:40]!r}, and a "
            "question's distractors are answers to questions of other groups. Give prompts of more groups, or none of "
            "them a `group`"
        )
    return Facts(prompts, tuple(found))


def _given(item: Prompt, n: int) -> tuple[Prompt, ...]:
    """Return the question with the first `n` distractors of the file that differ from its answer and each other."""
    different: dict[str, Prompt] = {}
    for text, ids in item.wrong:
        different.setdefault(normal(text), _with_answer(item, ids, text))
    different.pop(normal(item.answer), None)
    return tuple(different.values())[:n]


def _different(item: Prompt, others: Sequence[Prompt], n: int) -> list[Prompt]:
    """Return the question with the answers of the first `n` others whose answers differ from it and each other."""
    taken = {normal(item.answer)}
    found: list[Prompt] = []
    for other in others:
        if len(found) == n:
            break
        answer = normal(other.answer)
        if answer not in taken:
            taken.add(answer)
            found.append(with_answer_of(item, other))
    return found


def with_answer_of(item: Prompt, other: Prompt) -> Prompt:
    """Return a question with the answer to another question in place of its own."""
    ids = (*item.input_ids[: item.answer_start], *other.input_ids[other.answer_start :])
    return _with_answer(item, ids, other.answer)


def _with_answer(item: Prompt, ids: tuple[int, ...], answer: str) -> Prompt:
    """Return the question with another answer, given as the tokens of the whole text and as a string."""
    scored = range(item.answer_start - 1, len(ids) - 1)
    return replace(item, answer=answer, input_ids=ids, scored=scored, wrong=())


def words_of(item: Prompt) -> frozenset[str]:
    """Return the words of a question, which decide how similar two questions are."""
    return frozenset(item.prompt.split())


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the Jaccard index of two sets of words: the share of all their words that both contain.

    Args:
        first: Words of one question.
        second: Words of the other question.

    Returns:
        A number from 0 (no common word) to 1 (the same words).
    """
    return len(first & second) / (len(first | second) or 1)


def normal(answer: str) -> str:
    """Return an answer without the differences of case, spaces and full stop that make no other answer."""
    return " ".join(answer.lower().split()).rstrip(".")
