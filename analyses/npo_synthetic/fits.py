"""How a divergence grows with the steps of unlearning: as a line or as a logarithm.

Both laws have two parameters and are fitted by least squares to the same points, so R2 ranks them as AIC would; the
points of one run are no independent draws, so no probability is read off it, and intervals are over seeds. Two
exponents say the same without choosing between the laws:

    power         of value ~ t^power:             1 for a line through 0, towards 0 for a logarithm
    rate_power    of d value / d t ~ t^rate_power: 0 for any line, -1 for any logarithm

The second does not mind where a run began to grow, which the first does: read the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special

from unlearning.common.errors import InputError

LEAST_POINTS = 5
SHARES = (0.2, 0.5)
"""Fits begin at these shares of the steps, 2000 and 5000 of 10000: after the plateau that every run begins with."""
FITTED = ("forget_kl", "distance_to_finetuned")
FOLLOWS = 0.9
"""NPO has left gradient ascent where its divergence is less than this share of it."""


@dataclass(frozen=True)
class Growth:
    """The growth of the divergence in one run.

    Attributes:
        linear_r2: R2 of value = a + b t.
        logarithmic_r2: R2 of value = a + b log t.
        power: Exponent of value ~ t^power, by least squares of the logarithms; NaN if a value is not above 0.
        rate_power: Exponent of the growth between two evaluations; NaN if the value does not grow in one of them.
    """

    linear_r2: float
    logarithmic_r2: float
    power: float
    rate_power: float


def growth(steps: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Growth:
    """Fit both laws and both exponents.

    Args:
        steps: Steps of the evaluations, above 0 and increasing.
        values: Divergence at each step, in any unit.

    Returns:
        R2 of both laws, and both exponents.

    Raises:
        InputError: There are too few points, the steps are not above 0 or do not increase, or a value is not a number.
    """
    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.shape != y.shape or t.ndim != 1 or len(t) < LEAST_POINTS:
        raise InputError(f"growth needs at least {LEAST_POINTS} steps with a value each; there are {len(t)}")
    if not (np.isfinite(t).all() and np.isfinite(y).all()):
        raise InputError("growth needs finite steps and values; the run diverged, take fewer steps of it")
    if t[0] <= 0 or (np.diff(t) <= 0).any():
        raise InputError("growth needs increasing steps above 0; leave step 0 out and sort the others")
    rate = np.diff(y) / np.diff(t)
    return Growth(
        linear_r2=_r2(t, y),
        logarithmic_r2=_r2(np.log(t), y),
        power=_exponent(t, y),
        rate_power=_exponent(np.sqrt(t[1:] * t[:-1]), rate),
    )


def _r2(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> float:
    """Share of the variance that a least-squares line explains; NaN where nothing varies."""
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return float("nan")
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    return 1 - float(((y - y.mean() - slope * x) ** 2).sum()) / total


def _exponent(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> float:
    """Slope of log y by log x; NaN where a y is not above 0."""
    if (y <= 0).any():
        return float("nan")
    log_x = np.log(x) - np.log(x).mean()
    return float((log_x * np.log(y)).sum() / (log_x * log_x).sum())


def mean_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean over seeds and its Student t interval; the ends are NaN for a single seed."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, float("nan"), float("nan")
    reach = float(special.stdtrit(len(array) - 1, (1 + level) / 2) * array.std(ddof=1) / len(array) ** 0.5)
    return mean, mean - reach, mean + reach


def growth_table(limit: pd.DataFrame, n_steps: int) -> pd.DataFrame:
    """Fit every method of the limit, and average over the seeds with a 95 % interval.

    Args:
        limit: Rows of the limit with `method`, `beta`, `seed`, `step` and the metrics of `FITTED`.
        n_steps: Steps of unlearning, of which the ranges are shares.

    Returns:
        Columns `method`, `beta`, `metric`, `first_step`, `last_step`, `quantity` (the fields of `Growth`), `mean`,
        `low`, `high`, `lowest` and `highest` (of the seeds), `n_seeds`.

    Raises:
        InputError: There are too few evaluations to fit.
    """
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        later = limit[limit["step"] >= share * n_steps]
        for (method, beta), runs in later.groupby(["method", "beta"], sort=False, dropna=False):
            ends = {"first_step": int(runs["step"].min()), "last_step": int(runs["step"].max())}
            for metric in FITTED:
                fits = [
                    growth(run["step"].to_numpy(), run[metric].to_numpy())
                    for _, run in runs.groupby("seed", sort=False)
                ]
                for quantity in Growth.__dataclass_fields__:
                    values = [getattr(fit, quantity) for fit in fits]
                    mean, low, high = mean_interval(values)
                    seeds = {"lowest": min(values), "highest": max(values), "n_seeds": len(values)}
                    keys = {"method": method, "beta": beta, "metric": metric, **ends, "quantity": quantity}
                    rows.append({**keys, "mean": mean, "low": low, "high": high, **seeds})
    return pd.DataFrame(rows)


def departures(limit: pd.DataFrame) -> pd.DataFrame:
    """Find the first step at which each beta's forget KL is below `FOLLOWS` times that of gradient ascent.

    Args:
        limit: Rows of the limit, as `growth_table` takes them.

    Returns:
        Columns `beta`, `median`, `earliest`, `latest` (over seeds; NaN if a seed never leaves), `n_seeds`.
    """
    ascent = limit[limit["method"] == "GA"].set_index(["seed", "step"])["forget_kl"]
    rows = []
    for beta in sorted(limit["beta"].dropna().unique()):
        ours = limit[limit["beta"] == beta].set_index(["seed", "step"])["forget_kl"]
        behind = (ours < FOLLOWS * ascent.reindex(ours.index)).reset_index()
        left = behind[behind["forget_kl"]].groupby("seed")["step"].min().reindex(behind["seed"].unique())
        steps = left.to_numpy(np.float64)
        rows.append(
            {
                "beta": float(beta),
                "median": float(np.median(steps)),
                "earliest": float(steps.min()),
                "latest": float(steps.max()),
                "n_seeds": len(steps),
            }
        )
    return pd.DataFrame(rows)
