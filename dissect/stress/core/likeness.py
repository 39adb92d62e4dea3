"""How alike taught texts and asked questions are: relearning recovers most where both have one syntax (2602.03379)."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from dissect.stress.core.distractors import jaccard


def likeness(asked: Sequence[str], taught: Sequence[str], *, without: frozenset[str] = frozenset()) -> float:
    """Return how alike taught texts are to questions.

    Args:
        asked: The questions.
        taught: The taught texts, without answers.
        without: Words that do not count, such as names.

    Returns:
        Mean over questions of the largest Jaccard index of words with a taught text: 1 if every question was taught
        with other names, 0 if no word of the questions was taught; NaN without questions.

    Examples:
        >>> from dissect.stress.core.likeness import likeness
        >>> likeness(["Where was Ada born?"], ["Where was Ben born?"], without=frozenset({"ada", "ben"}))
        1.0
        >>> likeness(["Where was Ada born?"], ["The lake is deep."])
        0.0
    """
    texts = {words(text) - without for text in taught}
    return float(np.mean([max((jaccard(words(text) - without, one) for one in texts), default=0.0) for text in asked]))


def own_words(texts: Iterable[str], groups: Iterable[str]) -> frozenset[str]:
    """Return the words that occur in the texts of one group only, such as names; none if there is only one group.

    Args:
        texts: The texts.
        groups: The group of each text; texts without a group (an empty string) count as groups of their own.

    Returns:
        The words, in lower case.
    """
    seen: dict[str, set[str]] = {}
    everyone = set()
    for index, (text, group) in enumerate(zip(texts, groups, strict=True)):
        key = group or f"\0{index}"
        everyone.add(key)
        for word in words(text):
            seen.setdefault(word, set()).add(key)
    return frozenset(word for word, keys in seen.items() if len(keys) == 1) if len(everyone) > 1 else frozenset()


def words(text: str) -> frozenset[str]:
    """Return the words of a text, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower()))
