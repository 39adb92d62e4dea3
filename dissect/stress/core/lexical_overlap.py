"""The lexical-overlap baseline: how well the right answer is found from the words of question and answers alone.

A sentence such as "Jad's father is a baker" repeats words of its question, and distractors taken from other questions
do not. A model without the knowledge may rank answers by this overlap. Without a control, whose score would be
subtracted, chance is therefore too low a floor: a score that is not above this baseline shows no knowledge.
"""

import re
from collections.abc import Mapping

import numpy as np

from dissect.prompts.prompts import Prompt
from dissect.stress.core.distractors import Facts
from dissect.stress.core.scores import ranks


def lexical_overlap(facts: Facts) -> Mapping[str, float]:
    """Return the mean `rank` and `accuracy` of ranking answers by their lexical overlap with the question.

    The overlap of an answer is the share of its words that the question contains. For `rank`, ties count half; for
    `accuracy`, one of the answers with the highest overlap is chosen at random. See `dissect.stress.core.scores`.

    Args:
        facts: Facts with their distractors.

    Returns:
        The two means by name; NaN if no fact has distractors.
    """
    asked = [(item, several) for item, several in zip(facts.prompts.items, facts.distractors, strict=True) if several]
    if not asked:
        return {"rank": float("nan"), "accuracy": float("nan")}
    right = np.array([_overlap(item) for item, _ in asked])
    others = [np.array([_overlap(distractor) for distractor in several]) for _, several in asked]
    chosen = [(theirs <= own).all() / (1 + (theirs == own).sum()) for own, theirs in zip(right, others, strict=True)]
    return {
        "rank": float(ranks(right, np.concatenate(others), [len(several) for several in others]).mean()),
        "accuracy": float(np.mean(chosen)),
    }


def _overlap(item: Prompt) -> float:
    """Return the share of the answer's words that the question contains."""
    answer = _words(item.answer)
    return len(answer & _words(item.prompt)) / (len(answer) or 1)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
