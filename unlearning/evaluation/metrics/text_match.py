"""Agreement of a generated text with the answer, in any script (`text_words` says what a word is).

A metric that counts words has no value where the answer has none; it is None there, not 0. A model that says nothing
to an answer with words scores 0.
"""

from functools import cache
from typing import Any

from unlearning.evaluation.metrics.text_words import normalised, spoken_words


def exact_match(generated: str, answer: str) -> bool:
    """Return whether the two texts are equal up to white space at the ends and runs of it; case counts.

    Two empty texts do not match: a model that says nothing gave no answer.
    """
    words = normalised(generated).split()
    return bool(words) and words == normalised(answer).split()


def rouge_l_recall(generated: str, answer: str) -> float | None:
    """Return ROUGE-L recall with Porter stemming.

    Source: TOFU, arXiv 2401.06121 (its "ROUGE" on forget and retain questions); computed by `rouge-score`. Its own
    words are runs of a-z and 0-9; those here are the same for English, and words of every other script, too.

    Args:
        generated: Text of the model.
        answer: Reference text.

    Returns:
        Length of the longest common subsequence of words over the number of words of the answer, 0 to 1; None if the
        answer has no word.
    """
    return _score(generated, answer, stems=True, part="recall")


def rouge_l_f1(generated: str, answer: str) -> float | None:
    """Return ROUGE-L F1 without stemming.

    Source: MUSE, arXiv 2407.06460 (its verbatim and knowledge memorisation); computed by `rouge-score` with the words
    of `rouge_l_recall`. open-unlearning stems, which scores slightly higher.

    Args:
        generated: Text of the model.
        answer: Reference text.

    Returns:
        Harmonic mean of the longest common subsequence's share of either text, 0 to 1; None if the answer has no word.
    """
    return _score(generated, answer, stems=False, part="fmeasure")


def _score(generated: str, answer: str, *, stems: bool, part: str) -> float | None:
    if not spoken_words(answer):
        return None
    return float(getattr(_scorer(stems=stems).score(answer, generated)["rougeL"], part))


class _Words:
    """Splits texts for `rouge-score`, whose own words are made of ASCII letters and digits only."""

    def __init__(self, *, stems: bool) -> None:
        from nltk.stem.porter import PorterStemmer  # slow to import

        self._stem = PorterStemmer().stem if stems else None

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text; like `rouge-score`, stem those of more than three letters."""
        words = spoken_words(text)
        return words if self._stem is None else [self._stem(word) if len(word) > 3 else word for word in words]


@cache
def _scorer(*, stems: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return RougeScorer(["rougeL"], tokenizer=_Words(stems=stems))
