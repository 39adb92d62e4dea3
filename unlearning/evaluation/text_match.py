"""How well a generated text matches the answer."""

from functools import cache
from typing import Any


def exact_match(generated: str, answer: str) -> bool:
    """Whether the two texts are equal up to white space at the ends and runs of it within; case counts."""
    return generated.split() == answer.split()


def rouge_l_recall(generated: str, answer: str) -> float:
    """ROUGE-L recall with Porter stemming: longest common subsequence of words / words of the answer, 0 to 1.

    Source: TOFU, arXiv 2401.06121 (its "ROUGE" on forget and retain questions); computed by `rouge-score`.
    """
    return float(_scorer().score(answer, generated)["rougeL"].recall)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import: it loads nltk

    return RougeScorer(["rougeL"], use_stemmer=True)
