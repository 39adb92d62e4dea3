"""Statistics with their bootstrap draws, so that functions of several statistics have an interval, too.

The rows of a set are drawn in whole clusters (authors, concepts) if they have any. The same set of two models is drawn
with the same rows, so that the interval of a difference is that of paired rows; different sets are drawn independently.
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
        value: Value on the rows themselves.
        draws: Value on every bootstrap draw; the i-th draws of statistics of one set belong together.
        n: Number of rows behind the value.
    """

    value: float
    draws: Values
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % percentile interval; None for fewer than two rows, or if over half of the draws are not finite."""
        finite = self.draws[np.isfinite(self.draws)]
        if self.n < 2 or len(finite) < len(self.draws) / 2:
            return None
        low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


class Sample:
    """The rows of one set, and how often each bootstrap draw holds each row.

    Args:
        name: Name of the set; sets of the same name, size and grouping are drawn alike.
        groups: Cluster of each row; rows with "" stand alone.
        seed: Random seed of the draws.
        draws: Number of draws.
    """

    def __init__(self, name: str, groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> None:
        """Draw the rows `draws` times."""
        self.name = name
        self.n = len(groups)
        self.weights: Weights = times_drawn(clusters(groups), draws=draws, seed=[seed, zlib.crc32(name.encode())])

    def mean(self, values: Sequence[float] | Float[np.ndarray, " row"]) -> Resampled | None:
        """Return the mean over the rows whose value is a number; None if there is no such row."""
        array = np.asarray(values, dtype=np.float64)
        kept = ~np.isnan(array)
        if not kept.any():
            return None
        return resample(weighted_mean(array), self, n=int(kept.sum()))


def resample(statistic: Callable[..., Values], *samples: Sample, n: int | None = None) -> Resampled:
    """Compute a statistic of one or several sets, with its bootstrap draws.

    Args:
        statistic: Takes the weights ([draw, row]) of each sample's rows and returns one value per draw.
        *samples: The sets; each is resampled independently.
        n: Number of rows behind the value; None for all.

    Returns:
        The statistic.
    """
    value = statistic(*(np.ones((1, sample.n)) for sample in samples))
    draws = statistic(*(sample.weights for sample in samples))
    return Resampled(float(value[0]), draws, sum(sample.n for sample in samples) if n is None else n)


def fixed(value: float, n: int) -> Resampled:
    """Return a value that is not resampled, such as a p-value: the same on every draw.

    Args:
        value: The value.
        n: Number of rows behind it.

    Returns:
        The statistic.
    """
    return Resampled(value, np.full(DRAWS, value), n)


def weighted_mean(values: Float[np.ndarray, " row"]) -> Callable[[Weights], Values]:
    """Return, as a function for `resample`, the mean over rows whose value is a number; NaN without such rows."""
    kept = ~np.isnan(values)
    filled = np.where(kept, values, 0.0)

    def mean(weights: Weights) -> Values:
        with np.errstate(invalid="ignore"):
            return np.asarray((weights @ filled) / (weights @ kept))

    return mean


def combine(function: Callable[..., Values], *parts: Resampled) -> Resampled:
    """Compute a function of statistics, draw by draw: a difference, a ratio, a harmonic mean.

    Args:
        function: Takes one array of draws per statistic and returns one array.
        *parts: The statistics.

    Returns:
        The statistic; its number of rows is that of the smallest part.
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
    """One number of a benchmark, with what a reader needs to interpret it.

    Attributes:
        name: Name in lower case with underscores, the set first: `forget_probability`.
        estimate: Value with its draws; None if it cannot be computed.
        direction: Direction in which a good unlearned model differs.
        meaning: One sentence: the quantity, its unit, its range.
        reason: Reason why there is no value or no interval, and what to give to get one.
        has_interval: False if an interval would have no meaning, as for a p-value.
    """

    name: str
    estimate: Resampled | None
    direction: Direction
    meaning: str
    reason: str | None = None
    has_interval: bool = True
