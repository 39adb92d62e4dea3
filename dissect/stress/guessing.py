"""What can be told from the words alone: how well right answers are found by who knows nothing and compares words.

A sentence as "Jad's father is a baker" repeats its question, wrong answers from other questions do not, and a model
that never knew may go by it. Where there is no such model to take off, chance is the least that knowing nothing gives,
and this is more: what is not above it shows no knowledge.
"""

import re
from collections.abc import Mapping

import numpy as np

from dissect.prompts import Prompt
from dissect.stress.alternatives import Facts
from dissect.stress.scores import ranks


def guessing(facts: Facts) -> Mapping[str, float]:
    """Mean `rank` and `accuracy` (see `dissect.stress.scores`) of answers by the share of their words that the question
    has; NaN where no fact has wrong answers.

    Args:
        facts: with their wrong answers.
    """
    right = np.array([_repeated(item) for item in facts.prompts.items])
    wrong = np.array([_repeated(other) for several in facts.wrong for other in several])
    rank = ranks(right, wrong, [len(several) for several in facts.wrong])
    known = rank[~np.isnan(rank)]
    if not len(known):
        return {"rank": float("nan"), "accuracy": float("nan")}
    return {"rank": float(known.mean()), "accuracy": float((known == 1).mean())}


def _repeated(item: Prompt) -> float:
    answer = _words(item.answer)
    return len(answer & _words(item.prompt)) / (len(answer) or 1)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
