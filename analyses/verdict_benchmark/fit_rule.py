"""The rule of `dissect verdict`, fitted on the calibration families and on nothing else.

    tests                   relearning on other forgotten facts, by rank and by accuracy, with at most two candidates:
                            of all sets the one whose score is nearest to the true share, where that is known, or a
                            larger one that is as near, since tests that look elsewhere hold where one is blocked
    nothing, everything     by least squares, of the score's line between them
    spread                  root mean square of the residual of models that never knew, trained in other orders than the
                            control: of the test of the rule where it is largest
    suppressed_above        twice the highest lower end of a model that holds nothing, at least `MARGIN`
    erased_below            the highest upper end of nine in ten models that hold nothing, or the lowest of a model that
                            holds a half or more, if that is lower

Candidates put nothing of the base into the model, say nothing of the facts that are asked, and run in every budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from analyses.verdict_benchmark.constructions import NEVER_KNEW
from analyses.verdict_benchmark.measured import EXPRESSED, Measured, largest_residual
from dissect.verdicts.rule import Rule, Score, residual_knowledge

NEEDED = ("relearn_disjoint", "relearn_disjoint:accuracy")
"""The one test that finds knowledge wherever it was hidden; without it nothing is called erased. Rank sees what is left
of facts that all models were taught to avoid; accuracy is not outweighed by facts that the model never knew and was
taught to avoid all the same."""

CANDIDATES = (
    "logit_lens",
    "linear_probes",
    "own_direction",
    "relearn_benign",
    "relearn_benign:accuracy",
    "prune_changed",
    "quantisation",
)

AT_MOST = 2
"""Of them, beside the needed one."""

AS_NEAR = 0.001
"""In root mean square error of the score."""

MARGIN = 0.05
"""The effect below which a residual is not worth a word, whatever its interval."""

HALF = 0.5
"""A model that holds this share of the facts is not to be called erased."""

UTILITY_FLOOR = 0.8
KEPT = 0.9
"""Share of the models that hold nothing whose upper end is below `erased_below`."""


def fit(models: Sequence[Measured], fitted: Mapping[str, Any]) -> Rule:
    """The rule.

    Args:
        models: of the calibration families.
        fitted: what is said of its origin.
    """
    known = [model for model in models if model.share is not None and not model.collapsed]
    shares = np.array([model.share for model in known], dtype=np.float64)
    fits = list(_fits(known, shares))
    nearest = min(fits)[0]
    error, tests, nothing, everything = min(
        (fit for fit in fits if fit[0] <= nearest + AS_NEAR), key=lambda fit: (-len(fit[1]), fit[0])
    )
    rule = Rule(
        tests=tests,
        needed=NEEDED,
        nothing=nothing,
        everything=everything,
        spread=spread_of(models, tests),
        not_unlearned_above=EXPRESSED,
        suppressed_above=1.0,
        erased_below=0.0,
        utility_floor=UTILITY_FLOOR,
        fitted={},
        reference={},
    )
    empty = [residual_knowledge(model.residuals, rule) for model in models if model.kind == "erased"]
    half = [residual_knowledge(one.residuals, rule) for one in known if one.share is not None and one.share >= HALF]
    suppressed_above, erased_below = bounds_of(empty, half)
    said = {**fitted, "models": len(models), "error": error, "date": datetime.now(UTC).date().isoformat()}
    return replace(rule, suppressed_above=suppressed_above, erased_below=erased_below, fitted=said)


def _fits(
    models: Sequence[Measured], shares: Float[np.ndarray, " model"]
) -> Iterator[tuple[float, tuple[str, ...], float, float]]:
    """Root mean square error of the score, tests, and the scale's ends, for every set of tests."""
    for n in range(AT_MOST + 1):
        for others in combinations(CANDIDATES, n):
            tests = NEEDED + others
            largest = np.array([largest_residual(model.residuals, tests) for model in models])
            nothing, everything = scale(largest, shares)
            score = np.clip((largest - nothing) / (everything - nothing), 0, 1)
            yield float(np.sqrt(np.mean((score - shares) ** 2))), tests, nothing, everything


def scale(largest: Float[np.ndarray, " model"], shares: Float[np.ndarray, " model"]) -> tuple[float, float]:
    """The ends of the scale on which clipped residuals are nearest to the shares, to two decimals, by trying all."""
    low, high = (end / 100 for end in np.meshgrid(np.arange(31), np.arange(40, 111), indexing="ij"))
    scores = np.clip((largest - low[..., None]) / (high - low)[..., None], 0, 1)
    best = np.argmin(((scores - shares) ** 2).mean(-1))
    return float(low.flat[best]), float(high.flat[best])


def spread_of(models: Sequence[Measured], tests: Sequence[str]) -> float:
    """How far the residuals of models that never knew are from zero, root mean square, to three decimals.

    Args:
        models: of the calibration families.
        tests: of the rule; the one where it is largest counts.
    """
    never = [model for model in models if model.made == NEVER_KNEW]
    found = [[one.residuals[test].rho for one in never if test in one.residuals] for test in tests]
    known = [[rho for rho in rhos if rho is not None] for rhos in found]
    return round(max(float(np.sqrt(np.mean(np.square(rhos)))) for rhos in known if rhos), 3)


def bounds_of(empty: Sequence[Score], half: Sequence[Score]) -> tuple[float, float]:
    """`suppressed_above` and `erased_below`, to two decimals.

    Args:
        empty: scores of models that hold nothing.
        half: of models that hold a half or more.
    """
    lows, highs = (np.array([getattr(score, end) for score in empty], dtype=np.float64) for end in ("low", "high"))
    above = max(2 * float(lows.max()), MARGIN)
    below = float(np.ceil(100 * np.quantile(highs, KEPT, method="higher") + 1) / 100)
    holding = min((score.high for score in half if score.high is not None), default=1.0)
    return round(above, 2), min(below, float(np.floor(100 * holding) / 100))
