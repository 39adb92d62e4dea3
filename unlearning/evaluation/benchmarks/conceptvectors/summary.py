"""Metrics of ConceptVectors from the rows of vectors and texts.

Vectors, each a mean over concepts; `unlearning.evaluation.metrics.concept_vectors` has the formulas:
`vector_cosine`, `vector_l2`, `vector_jaccard_unembed` (published), `vector_jaccard_norm_unembed`,
`vector_preciser_jaccard`, `vector_related_token_rate`.

Texts, each a mean over prompts, 0 to 1, of BLEU or ROUGE-L F1 between the model's greedy text and the base's:
`qa_*`, `completion_*`, `target_*` (both; lower if the concept was forgotten), `unrelated_*` (higher), and
`difference_*` = unrelated - target (higher). With `noise_S_` before the name, the same between the base's own text
with noise N(0, S^2) on the concept's vector and without. `target_empty` and `unrelated_empty` are the shares of the
model's texts that are empty; an empty text resembles none (BLEU and ROUGE-L 0).

Source: ConceptVectors, arXiv 2406.11614.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unlearning.evaluation.harness import Rows
from unlearning.evaluation.statistics import Direction, Metric, Resampled, Sample, combine

_OLD_COLUMNS = {"jaccard": "jaccard_unembed"}
"""Columns of runs written by earlier versions, with their present names."""

QA, COMPLETION, UNRELATED, VECTORS = "qa", "completion", "unrelated", "vectors"
TARGET = (QA, COMPLETION)


def summarise(rows: Rows, *, noise: Sequence[float], vectors: bool, seed: int) -> list[Metric]:
    """Compute the metrics of this module.

    Args:
        rows: Rows of every set.
        noise: Standard deviations of the noise on the base's vectors.
        vectors: The value vectors were asked for.
        seed: Random seed of the bootstrap.

    Returns:
        The metrics of the vectors, then those of the texts, then those of each noise.
    """
    texts = rows[rows["set"].isin((QA, COMPLETION, UNRELATED))]
    metrics = _vector_metrics(rows[rows["set"] == VECTORS], vectors=vectors, seed=seed)
    metrics += _text_metrics(texts, "", "with the base's text", seed)
    metrics += _empty_metrics(texts, seed)
    for scale in noise:
        some = rows[rows["set"] == f"noise-{scale:g}"]
        metrics += _text_metrics(
            some,
            f"noise_{scale:g}_",
            f"of the noised base's text (noise N(0, {scale:g}^2) on the vector) with its clean text",
            seed,
        )
    return metrics


def _vector_metrics(rows: Rows, *, vectors: bool, seed: int) -> list[Metric]:
    described: dict[str, tuple[Direction, str]] = {
        "cosine": ("lower is better", "mean cosine of the concepts' value vectors with the base's, -1 to 1"),
        "l2": ("higher is better", "mean L2 distance of the concepts' value vectors from the base's"),
        "jaccard_unembed": (
            "lower is better",
            "mean Jaccard overlap of the 200 tokens that the vectors promote most, read with the unembedding alone "
            "(as published), 0 to 1",
        ),
        "jaccard_norm_unembed": (
            "lower is better",
            "mean Jaccard overlap of the 200 tokens that the vectors promote most, read with the final norm and the "
            "unembedding, 0 to 1",
        ),
        "preciser": (
            "lower is better",
            "promoted tokens that are in the concept's article, after over before unlearning; may exceed 1",
        ),
        "related": (
            "lower is better",
            "share of the base's promoted tokens in the concept's article that are still promoted, 0 to 1",
        ),
    }
    names = {"preciser": "preciser_jaccard", "related": "related_token_rate"}
    reason = "left out by `vectors=False`" if not vectors else "no record names its vector (Layer and Dim)"
    rows = rows.rename(columns=_OLD_COLUMNS)
    sample = None if rows.empty else Sample("concepts", rows["group"].tolist(), seed=seed)
    metrics = []
    for column, (direction, meaning) in described.items():
        if sample is not None and column not in rows:
            earlier = "the run was written by an earlier version; evaluate again into another directory"
            metrics.append(Metric(f"vector_{column}", None, direction, meaning, earlier))
            continue
        estimate = None if sample is None else sample.mean(rows[column].to_numpy(np.float64))
        missing = None
        if estimate is None:
            missing = reason if rows.empty else "no promoted token is in a concept's article (wikipedia_content)"
            if column == "cosine" and not rows.empty:
                missing = "the vectors are zero"
        metrics.append(Metric(f"vector_{names.get(column, column)}", estimate, direction, meaning, missing))
    return metrics


def _empty_metrics(rows: Rows, seed: int) -> list[Metric]:
    """Return the share of texts that are empty, which resemble no text of the base."""
    sample = Sample("texts", rows["group"].tolist(), seed=seed)
    empty = (rows["text"].fillna("").str.strip() == "").to_numpy(np.float64)
    metrics = []
    for name, kinds, what in (
        ("target", TARGET, "questions and texts about the concepts"),
        ("unrelated", (UNRELATED,), "unrelated questions"),
    ):
        share = sample.mean(np.where(rows["kind"].isin(kinds), empty, np.nan))
        missing = None if share else f"no concept has {what}"
        metrics.append(
            Metric(
                f"{name}_empty",
                share,
                "lower is better",
                f"share of the model's texts that are empty, {what}, 0 to 1",
                missing,
            )
        )
    return metrics


def _text_metrics(rows: Rows, prefix: str, of: str, seed: int) -> list[Metric]:
    """Return means by set, and unrelated minus target; a bootstrap draw takes a concept with all of its prompts."""
    sample = Sample(f"{prefix}texts", rows["group"].tolist(), seed=seed)
    metrics = []
    for column, name in (("bleu", "BLEU"), ("rouge_l", "ROUGE-L F1")):
        values = rows[column].to_numpy(np.float64)

        def mean(*kinds: str, values: Any = values) -> Resampled | None:
            return sample.mean(np.where(rows["kind"].isin(kinds), values, np.nan))

        target, unrelated = mean(*TARGET), mean(UNRELATED)
        sets: list[tuple[str, Resampled | None, Direction, str]] = [
            ("qa", mean(QA), "lower is better", "questions about the concepts"),
            ("completion", mean(COMPLETION), "lower is better", "texts about the concepts"),
            ("target", target, "lower is better", "questions and texts about the concepts"),
            ("unrelated", unrelated, "higher is better", "unrelated questions"),
        ]
        if prefix:
            sets = sets[2:]
        for kind, estimate, direction, what in sets:
            missing = None if estimate else f"no concept has {what}"
            metrics.append(
                Metric(f"{prefix}{kind}_{column}", estimate, direction, f"mean {name} {of}, {what}", missing)
            )
        gap = combine(np.subtract, unrelated, target) if target and unrelated else None
        metrics.append(
            Metric(
                f"{prefix}difference_{column}",
                gap,
                "higher is better",
                f"{name} {of}: unrelated questions minus those about the concepts; 0 if both changed equally",
                None if gap else "needs questions about the concepts and unrelated ones",
            )
        )
    return metrics
