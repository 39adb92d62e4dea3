"""Similarity of two generated texts: BLEU by nltk and ROUGE-L by rouge-score, both 0 to 1.

A text of white space only resembles nothing, not even another one: two models that say nothing do not agree.
"""

from unlearning.evaluation.metrics.text_match import exact_match, rouge_l_f1
from unlearning.evaluation.metrics.text_words import spaced_words


def bleu(generated: str, reference: str) -> float:
    """Return sentence BLEU-4 of words separated by white space, smoothed by NIST's geometric sequence (nltk's method3).

    A generated text of fewer than four words is scored by the n-grams that it has, so equal texts always score 1. In
    scripts without spaces every character is a word.
    Source: Chen and Cherry 2014 (method 3); the measure of ConceptVectors (2406.11614).

    Args:
        generated: Text of the model.
        reference: Text that it is compared with.

    Returns:
        A score, 0 to 1; 0 if either text is empty.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # slow to import

    if exact_match(generated, reference):
        return 1.0
    ours, theirs = spaced_words(generated), spaced_words(reference)
    if not ours or not theirs:
        return 0.0
    return float(sentence_bleu([theirs], ours, smoothing_function=SmoothingFunction().method3, auto_reweigh=True))


def rouge_l(generated: str, reference: str) -> float | None:
    """Return ROUGE-L F1: longest common subsequence of lower-case words relative to the words of each text.

    The words are those of `text_match`, without stemming.

    Args:
        generated: Text of the model.
        reference: Text that it is compared with.

    Returns:
        A score, 0 to 1; 0 if either text is empty; None if the texts differ and the reference has no word, such as "?".
    """
    if exact_match(generated, reference):
        return 1.0
    if not generated.strip() or not reference.strip():
        return 0.0
    return rouge_l_f1(generated, reference)
