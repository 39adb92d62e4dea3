"""Agreement of a generated text with the answer."""

from functools import cache
from typing import Any


def exact_match(generated: str, answer: str) -> bool:
    """Return whether the two texts are equal up to white space at the ends and runs of it; case counts."""
    return generated.split() == answer.split()


def rouge_l_recall(generated: str, answer: str) -> float:
    """Return ROUGE-L recall with Porter stemming.

    Source: TOFU, arXiv 2401.06121 (its "ROUGE" on forget and retain questions); computed by `rouge-score`.

    Args:
        generated: Text of the model.
        answer: Reference text.

    Returns:
        Length of the longest common subsequence of words over the number of words of the answer, 0 to 1.
    """
    return float(_scorer(stems=True).score(answer, generated)["rougeL"].recall)


def rouge_l_f1(generated: str, answer: str) -> float:
    """Return ROUGE-L F1 without stemming.

    Source: MUSE, arXiv 2407.06460 (its verbatim and knowledge memorisation); computed by `rouge-score`, whose words are
    runs of a-z and 0-9. open-unlearning stems, which scores slightly higher.

    Args:
        generated: Text of the model.
        answer: Reference text.

    Returns:
        Harmonic mean of the longest common subsequence's share of either text, 0 to 1.
    """
    return float(_scorer(stems=False).score(answer, generated)["rougeL"].fmeasure)


@cache
def _scorer(*, stems: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import: it loads nltk

    return RougeScorer(["rougeL"], use_stemmer=stems)
