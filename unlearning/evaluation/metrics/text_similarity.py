"""How alike two generated texts are: BLEU by nltk and ROUGE-L by rouge-score, both between 0 and 1."""

import re
from functools import cache
from typing import Any


def bleu(generated: str, reference: str) -> float:
    """Sentence BLEU-4 of words between white space, smoothed by NIST's geometric sequence (nltk's method3).

    A generated text of fewer than four words is scored by the n-grams that it has, so that equal texts always
    score 1. Source: Chen and Cherry 2014 (method 3); the measure of ConceptVectors (2406.11614).
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
    """ROUGE-L F1: longest common subsequence of lower-case words against the words of each text.

    On English text these are rouge-score's default words, without stemming; letters of other scripts, which its
    default throws away, make words too.
    """
    if generated.split() == reference.split():
        return 1.0
    return float(_rouge().score(reference, generated)["rougeL"].fmeasure)


class _Words:
    """rouge-score's tokenizer for every script: runs of letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
