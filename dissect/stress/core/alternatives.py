"""Wrong answers to every question, so that knowing the answer can be told from knowing what answers look like.

A model that never knew gives an answer and a wrong answer of the same kind the same probability on average: the share
of wrong answers that are less probable than the right one is 1/2 for it, whatever training did to answers in general.
That holds of the answers to other questions, each of which is right once; wrong answers that somebody wrote may look
otherwise than right ones (two models that never knew score .72 and .76 on TOFU's perturbed answers, .50 on others').
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dissect.prompts.prompts import Prompt, Prompts
from unlearning.common.errors import InputError

N_WRONG = 8
"""Wrong answers to a question."""

_CANDIDATES = 1000
"""Questions at most whose answers are looked at for one question."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Questions with their answers, and wrong answers to each.

    Attributes:
        prompts: the questions with their right answers.
        wrong: for each question, itself with a wrong answer in the place of the right one.
    """

    prompts: Prompts
    wrong: tuple[tuple[Prompt, ...], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def groups(self) -> list[str]:
        """The group of each fact."""
        return [item.group for item in self.prompts.items]

    @property
    def sha256(self) -> str:
        """Content hash of what is computed on: the questions, and the tokens of the wrong answers."""
        tokens = [[item.input_ids for item in wrong] for wrong in self.wrong]
        return hashlib.sha256(json.dumps([self.prompts.sha256, tokens]).encode()).hexdigest()

    def select(self, places: Sequence[int]) -> "Facts":
        """Some of the facts, with the wrong answers that they have."""
        items = tuple(self.prompts.items[place] for place in places)
        return Facts(replace(self.prompts, items=items), tuple(self.wrong[place] for place in places))


def with_wrong_answers(
    prompts: Prompts, *, written: bool = True, n: int = N_WRONG, seed: int = 0, name: str = "forget"
) -> Facts:
    """Find wrong answers: those that the file gives, else the answers to the most similar questions.

    Similar means the most words in common (Jaccard's share), among questions of another group where there are groups;
    of equally similar ones the seed decides. No wrong answer is the right one, none comes twice.

    Args:
        prompts: questions with answers, of `answer` scoring.
        written: whether to take those that the file gives; only a model that never knew tells what they are worth.
        n: wrong answers to each, at most; there are fewer where the questions have fewer different answers.
        seed: of the order among equally similar questions.
        name: of the set, for messages.

    Raises:
        InputError: prompts of `notebook` scoring, or prompts whose answers are all the same.
    """
    if prompts.scoring != "answer":
        raise InputError(f"the {name} prompts have {prompts.scoring} scoring; load them with scoring='answer'")
    answers = [_normal(item.answer) for item in prompts.items]
    given = any(item.wrong for item in prompts.items)
    if len(set(answers)) < 2 and not (written and given):
        raise InputError(
            f"the {name} prompts have one answer between them ({prompts.items[0].answer[:40]!r}): nothing tells "
            "knowing it from always saying it; give prompts with different answers"
            + (", or a never model, by which the file's own wrong answers can be used" if given else "")
        )
    words = [words_of(item) for item in prompts.items]
    order = sorted(range(len(prompts)), key=lambda place: zlib.crc32(f"{seed} {prompts.items[place].id}".encode()))
    turn = {place: number for number, place in enumerate(order)}
    wrong = []
    for place, item in enumerate(prompts.items):
        if written and item.wrong:
            wrong.append(tuple(_asked(item, ids, text) for text, ids in item.wrong[:n]))
            continue
        # Each question begins elsewhere, so that of equally similar ones not all questions get the same.
        candidates = [*order[turn[place] + 1 :], *order[: turn[place]]][:_CANDIDATES]
        allowed = [other for other in candidates if prompts.items[other].group != item.group or not item.group]
        allowed.sort(key=lambda other: -jaccard(words[place], words[other]))
        wrong.append(tuple(_different(item, [prompts.items[other] for other in allowed], n)))
    return Facts(prompts, tuple(wrong))


def _different(item: Prompt, others: Sequence[Prompt], n: int) -> list[Prompt]:
    taken = {_normal(item.answer)}
    found: list[Prompt] = []
    for other in others:
        if len(found) == n:
            break
        answer = _normal(other.answer)
        if answer not in taken:
            taken.add(answer)
            ids = (*item.input_ids[: item.answer_start], *other.input_ids[other.answer_start :])
            found.append(_asked(item, ids, other.answer))
    return found


def _asked(item: Prompt, ids: tuple[int, ...], answer: str) -> Prompt:
    scored = range(item.answer_start - 1, len(ids) - 1)
    return replace(item, answer=answer, input_ids=ids, scored=scored, wrong=())


def words_of(item: Prompt) -> frozenset[str]:
    """The words of a question, by which questions are told to be alike."""
    return frozenset(item.prompt.split())


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of the words of two questions that both have."""
    return len(one & other) / (len(one | other) or 1)


def _normal(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".")
