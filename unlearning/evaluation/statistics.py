"""Statistics with their bootstrap draws, so that what is computed from several of them has an interval too.

A set's rows are drawn in whole clusters (authors, concepts) where there are some. The same set in two models is drawn
alike, which makes the interval of a difference that of paired rows; different sets are drawn apart.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from unlearning.common.bootstrap import LEVEL, clusters, times_drawn

DRAWS = 2000

Weights = Float[np.ndarray, "draw row"]
Values = Float[np.ndarray, " draw"]


@dataclass(frozen=True, eq=False)
class Resampled:
    """A statistic.

    Attributes:
        value: on the rows themselves.
        draws: on every bootstrap draw; the i-th draws of statistics of one set belong together.
        n: rows behind it.
    """

    value: float
    draws: Values
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % percentile interval; None where the draws do not vary for want of rows, or are not numbers."""
        finite = self.draws[np.isfinite(self.draws)]
        if self.n < 2 or len(finite) < len(self.draws) / 2:
            return None
        low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


class Sample:
    """The rows of one set, and how often each is in each bootstrap draw.

    Args:
        name: of the set; sets of one name, size and grouping are drawn alike.
        groups: the cluster of each row; rows of "" stand alone.
        seed: of the draws.
        draws: how many.
    """

    def __init__(self, name: str, groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> None:
        self.name = name
        self.n = len(groups)
        self.weights: Weights = times_drawn(clusters(groups), draws=draws, seed=[seed, zlib.crc32(name.encode())])

    def mean(self, values: Sequence[float] | Float[np.ndarray, " row"]) -> Resampled | None:
        """Mean over the rows whose value is a number; None where there is none."""
        array = np.asarray(values, dtype=np.float64)
        kept = ~np.isnan(array)
        if not kept.any():
            return None
        return resample(weighted_mean(array), self, n=int(kept.sum()))


def resample(statistic: Callable[..., Values], *samples: Sample, n: int | None = None) -> Resampled:
    """A statistic of one or several sets.

    Args:
        statistic: takes the weights ([draw, row]) of each sample's rows and gives one value a draw.
        samples: the sets; each is resampled by itself.
        n: rows behind it; by default all.
    """
    value = statistic(*(np.ones((1, sample.n)) for sample in samples))
    draws = statistic(*(sample.weights for sample in samples))
    return Resampled(float(value[0]), draws, sum(sample.n for sample in samples) if n is None else n)


def fixed(value: float, n: int) -> Resampled:
    """A value that is not resampled, as a p-value: the same on every draw."""
    return Resampled(value, np.full(DRAWS, value), n)


def weighted_mean(values: Float[np.ndarray, " row"]) -> Callable[[Weights], Values]:
    """Mean over the rows whose value is a number, for `resample`; NaN on a draw that has none of them."""
    kept = ~np.isnan(values)
    filled = np.where(kept, values, 0.0)

    def mean(weights: Weights) -> Values:
        with np.errstate(invalid="ignore"):
            return np.asarray((weights @ filled) / (weights @ kept))

    return mean


def combine(function: Callable[..., Values], *parts: Resampled) -> Resampled:
    """A function of statistics, draw by draw: a difference, a ratio, a harmonic mean.

    The number of rows is that of the smallest part.
    """
    value = function(*(np.array([part.value]) for part in parts))
    return Resampled(float(value[0]), function(*(part.draws for part in parts)), min(part.n for part in parts))


Direction = Literal[
    "lower is better",
    "higher is better",
    "closer to the control is better",
    "closer to 0 is better",
    "descriptive, no direction",
]


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark, with what a reader needs to trust it.

    Attributes:
        name: in lower case with underscores, the set first: `forget_probability`.
        estimate: None where it cannot be computed.
        direction: what a good unlearned model shows.
        meaning: one sentence: what it is, with its floor and ceiling where they are not obvious.
        reason: why there is no value or no interval; what to give to get one.
        has_interval: false where an interval would mean nothing, as for a p-value.
    """

    name: str
    estimate: Resampled | None
    direction: Direction
    meaning: str
    reason: str | None = None
    has_interval: bool = True
