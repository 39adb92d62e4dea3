"""Similarity of two generated texts: BLEU by nltk and ROUGE-L by rouge-score, both 0 to 1."""

import re
from functools import cache
from typing import Any


def bleu(generated: str, reference: str) -> float:
    """Return sentence BLEU-4 of words separated by white space, smoothed by NIST's geometric sequence (nltk's method3).

    A generated text of fewer than four words is scored by the n-grams that it has, so equal texts always score 1.
    Source: Chen and Cherry 2014 (method 3); the measure of ConceptVectors (2406.11614).

    Args:
        generated: Text of the model.
        reference: Text that it is compared with.

    Returns:
        A score, 0 to 1.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # slow to import

    if generated.split() == reference.split():
        return 1.0
    score = sentence_bleu(
        [reference.split()],
        generated.split(),
        smoothing_function=SmoothingFunction().method3,
        auto_reweigh=True,
    )
    return float(score)


def rouge_l(generated: str, reference: str) -> float:
    """Return ROUGE-L F1: longest common subsequence of lower-case words relative to the words of each text.

    For English text the words are rouge-score's default words, without stemming; letters of other scripts, which its
    default ignores, form words, too.

    Args:
        generated: Text of the model.
        reference: Text that it is compared with.

    Returns:
        A score, 0 to 1.
    """
    if generated.split() == reference.split():
        return 1.0
    return float(_rouge().score(reference, generated)["rougeL"].fmeasure)


class _Words:
    """Split text of every script into words for rouge-score: runs of letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
