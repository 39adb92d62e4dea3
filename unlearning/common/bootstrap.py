"""95 % intervals by bootstrap over groups, or over examples where there are no groups.

All statistics of a run use the same draws, so that the interval of a difference is that of paired values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval and the number of examples behind it."""

    value: float
    low: float
    high: float
    n: int


def clusters(groups: Sequence[str]) -> Int[np.ndarray, " example"]:
    """What is drawn whole, by number: groups; examples where there is no group (""), or only one."""
    keys = [group or f"\0{index}" for index, group in enumerate(groups)]
    if len(set(keys)) == 1:
        keys = [str(index) for index in range(len(keys))]
    return np.unique(keys, return_inverse=True)[1]


def times_drawn(
    cluster: Int[np.ndarray, " example"], *, draws: int, seed: int | Sequence[int]
) -> Float[np.ndarray, "draw example"]:
    """How often each example is in each draw of as many clusters as there are, with replacement."""
    n_clusters = int(cluster.max()) + 1
    generator = np.random.default_rng(seed)
    times = generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)
    return times[:, cluster].astype(np.float64)


class Bootstrap:
    """Cluster bootstrap: whole groups are drawn with replacement (percentile intervals).

    Args:
        groups: the group of each example; examples whose group is "" stand alone.
        draws: number of bootstrap samples.
        seed: of the draws.
        equal_groups: weigh each group's mean alike, as the released notebooks do (mean over a concept's
            questions, then over concepts), instead of each example.
    """

    def __init__(self, groups: list[str], *, draws: int = 2000, seed: int = 0, equal_groups: bool = False) -> None:
        self._cluster = clusters(groups)
        self._equal_groups = equal_groups
        self._weights = times_drawn(self._cluster, draws=draws, seed=seed)

    def mean(self, values: Float[np.ndarray, " example"]) -> Estimate:
        """Mean of the values that are not NaN."""
        return self.ratio(values, np.ones_like(values))

    def ratio(self, numerators: Float[np.ndarray, " example"], denominators: Float[np.ndarray, " example"]) -> Estimate:
        """Ratio of the two means, over the examples where both are numbers."""
        kept = ~(np.isnan(numerators) | np.isnan(denominators))
        n = int(kept.sum())
        if n == 0:
            return Estimate(np.nan, np.nan, np.nan, 0)
        base = kept.astype(np.float64)
        if self._equal_groups:
            base /= np.maximum(np.bincount(self._cluster, weights=kept), 1)[self._cluster]
        top, bottom = base * np.where(kept, numerators, 0.0), base * np.where(kept, denominators, 0.0)
        value = float(top.sum() / bottom.sum())
        if len(set(self._cluster[kept])) < 2:
            return Estimate(value, np.nan, np.nan, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (self._weights @ top) / (self._weights @ bottom)
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), n)
