"""What can be told from the words alone: how well right answers are found by who knows nothing and compares words.

A sentence as "Jad's father is a baker" repeats its question, wrong answers from other questions do not, and a model
that never knew may go by it. Where there is no such model to take off, chance is the least that knowing nothing gives,
and this is more: what is not above it shows no knowledge.
"""

import re
from collections.abc import Mapping

import numpy as np

from dissect.prompts.prompts import Prompt
from dissect.stress.core.alternatives import Facts
from dissect.stress.core.scores import ranks


def guessing(facts: Facts) -> Mapping[str, float]:
    """Mean `rank` and `accuracy` (see `dissect.stress.core.scores`) of answers by the share of their words that the
    question has, choosing at random among equal ones; NaN where no fact has wrong answers.

    Args:
        facts: with their wrong answers.
    """
    asked = [(item, several) for item, several in zip(facts.prompts.items, facts.wrong, strict=True) if several]
    if not asked:
        return {"rank": float("nan"), "accuracy": float("nan")}
    right = np.array([_repeated(item) for item, _ in asked])
    wrong = [np.array([_repeated(other) for other in several]) for _, several in asked]
    chosen = [(others <= own).all() / (1 + (others == own).sum()) for own, others in zip(right, wrong, strict=True)]
    return {
        "rank": float(ranks(right, np.concatenate(wrong), [len(others) for others in wrong]).mean()),
        "accuracy": float(np.mean(chosen)),
    }


def _repeated(item: Prompt) -> float:
    answer = _words(item.answer)
    return len(answer & _words(item.prompt)) / (len(answer) or 1)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
