"""Metrics of text quality from the rows of the texts.

Every metric is a mean over texts, whose rows the bootstrap draws in whole groups.

    metric                 formula                                          unit, range      intact  source
    empty                  share of texts without a visible character       0 to 1           lower   here
    gibberish              share of texts that the rule calls gibberish     0 to 1           lower   here
    loop, broken_words,    the three faults of that rule                    0 to 1           lower   here
    unpronounceable
    repetition_3           repeated word 3-grams / word 3-grams of a text   0 to 1           lower   1908.04319
    longest_run            longest run of one word                          1 or more        lower   here
    distinct_1, _2         distinct n-grams / n-grams of all texts          0 to 1           higher  1510.03055
    entropy_1, _3          - sum p log2 p over the n-grams of a text        bits, 0 or more  -       1809.05972
    length                 words of a text                                  words            -       -
    nll_under_base         mean of -log p(token) under the base             nats per token   lower   -
    perplexity_under_base  exp(nll_under_base)                              1 or more        lower   -
    fluency                p(clean) under the classifier                    0 to 1           higher  2506.12618
"""

from typing import get_args

import numpy as np

from unlearning.evaluation.harness import Rows
from unlearning.evaluation.metrics.text_quality import Fault, distinct_n, words
from unlearning.evaluation.statistics import Metric, Resampled, Sample, combine


def summarise(rows: Rows, *, seed: int, has_base: bool, has_classifier: bool) -> list[Metric]:
    """Compute the metrics of this module from the rows of all texts.

    Args:
        rows: One row per text.
        seed: Random seed of the bootstrap.
        has_base: A base scored the texts.
        has_classifier: A classifier scored the texts.

    Returns:
        The metrics, in the order of the table above.
    """
    sample = Sample("texts", rows["group"].tolist(), seed=seed)
    texts = rows["text"].tolist()
    split = [words(text) for text in texts]

    def mean(column: str) -> Resampled | None:
        return sample.mean(rows[column].to_numpy(np.float64))

    def share(*faults: str) -> Resampled | None:
        return sample.mean(rows["fault"].isin(faults).to_numpy(np.float64))

    few = "no text has three words"
    metrics = [
        Metric("empty", share("empty"), "lower is better", "share of texts that hold nothing but white space"),
        Metric(
            "gibberish",
            share(*(name for name in get_args(Fault) if name != "empty")),
            "lower is better",
            "share of texts that the rule calls gibberish: loop, broken words or unpronounceable",
        ),
        Metric("loop", share("loop"), "lower is better", "share of texts that repeat a phrase four times or more"),
        Metric(
            "broken_words",
            share("broken words"),
            "lower is better",
            "share of texts in which more than half of the words are not words",
        ),
        Metric(
            "unpronounceable",
            share("unpronounceable"),
            "lower is better",
            "share of texts whose letters hold too few vowels",
        ),
        Metric(
            "repetition_3",
            mean("repetition_3"),
            "lower is better",
            "mean share of a text's word 3-grams that occur earlier in it, 0 to 1, over texts of three words or more",
            None if mean("repetition_3") else few,
        ),
        Metric(
            "longest_run",
            mean("longest_run"),
            "lower is better",
            "mean over texts of the longest run of one word; 1 if no word follows itself",
            None if mean("longest_run") else "all texts are empty",
        ),
        *(_distinct(split, n) for n in (1, 2)),
        Metric(
            "entropy_1",
            mean("entropy_1"),
            "descriptive, no direction",
            "mean entropy of a text's words in bits: 0 for one repeated word, at most log2(number of words)",
            None if mean("entropy_1") else "all texts are empty",
        ),
        Metric(
            "entropy_3",
            mean("entropy_3"),
            "descriptive, no direction",
            "mean entropy of a text's word 3-grams in bits, over texts of three words or more",
            None if mean("entropy_3") else few,
        ),
        Metric("length", mean("n_words"), "descriptive, no direction", "mean number of words"),
    ]
    return metrics + _base_metrics(mean("base_nll"), has_base) + [_fluency(mean("fluency"), has_classifier)]


def _distinct(split: list[list[str]], n: int) -> Metric:
    value = distinct_n(split, n)
    return Metric(
        f"distinct_{n}",
        None if value is None else Resampled(value, np.full(1, np.nan), len(split)),
        "higher is better",
        f"distinct word {n}-grams over all word {n}-grams of all texts, 0 to 1; lower if texts resemble each other; "
        "compare at equal numbers of texts",
        f"no text has {n} words" if value is None else "a bootstrap draw holds texts twice, which lowers the value",
        has_interval=False,
    )


def _base_metrics(nll: Resampled | None, has_base: bool) -> list[Metric]:
    missing = "all texts are empty" if has_base else "give `base`, an intact model that scores the texts"
    perplexity = None
    if nll is not None:
        with np.errstate(over="ignore"):
            perplexity = combine(np.exp, nll)
    too_large = perplexity is not None and not np.isfinite(perplexity.value)
    return [
        Metric(
            "nll_under_base",
            nll,
            "lower is better",
            "mean over texts of the base's negative log-likelihood per token, in nats; loops lower it, too: read it "
            "next to repetition",
            None if nll else missing,
        ),
        Metric(
            "perplexity_under_base",
            None if too_large else perplexity,
            "lower is better",
            "exp of nll_under_base: the geometric mean of the texts' perplexities",
            "too large for a floating-point number; see nll_under_base" if too_large else None if nll else missing,
        ),
    ]


def _fluency(value: Resampled | None, has_classifier: bool) -> Metric:
    missing = "all texts are empty" if has_classifier else "give `classifier`, a detector of gibberish"
    return Metric(
        "fluency",
        value,
        "higher is better",
        "mean probability of the classifier's clean class over texts that are not empty, 0 to 1",
        None if value else missing,
    )
