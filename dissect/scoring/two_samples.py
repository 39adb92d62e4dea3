"""Compare two sets of examples: differences, ratios and dominance, with 95 % bootstrap intervals.

Sets that share nothing are resampled independently. Sets that share examples or groups are resampled together, so that
the interval is that of paired values:

    ids      both sets hold the same examples by id: pairs are drawn (whole groups of pairs where there are groups)
    groups   both sets ask about the same two or more groups (concepts, people): groups are drawn, each with its
             examples of both sets

Groups are drawn whole, as in `unlearning.common.bootstrap.Bootstrap`, with percentile intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from unlearning.common.bootstrap import LEVEL, Estimate, clusters, times_drawn

Pairing = Literal["ids", "groups", "none"]
Values = Float[np.ndarray, " example"]
Weights = Float[np.ndarray, "draw example"]

_DRAWS = 2000


@dataclass(frozen=True)
class Example:
    """Identifier and group of an example; they decide how two sets are paired.

    Attributes:
        id: The identifier, or "" for an example without one.
        group: The group, or "".
    """

    id: str
    group: str


class TwoSamples:
    """Two sets of examples, and the number of times each example is in each bootstrap draw.

    Args:
        first: Examples of the first set, in the order of the values that are compared later.
        second: Examples of the second set.
        seed: Random seed of the draws.
        draws: Number of draws.

    Attributes:
        pairing: What the two sets share.
    """

    def __init__(self, first: Sequence[Example], second: Sequence[Example], *, seed: int, draws: int = _DRAWS) -> None:
        self.pairing: Pairing = _pairing(first, second)
        self._partner: Int[np.ndarray, " example"] | None = None
        self._clusters = (_clusters(first), _clusters(second))
        if self.pairing == "ids":
            position = {example.id: index for index, example in enumerate(second)}
            self._partner = np.array([position[example.id] for example in first])
            self._clusters = (self._clusters[0], self._clusters[0])
        # Sets that share examples or groups share the stream of random numbers, and so draw the same clusters.
        streams = (0, 1) if self.pairing == "none" else (0, 0)
        self._weights = tuple(
            times_drawn(cluster, draws=draws, seed=[seed, stream])
            for cluster, stream in zip(self._clusters, streams, strict=True)
        )

    def difference(self, first: Values, second: Values) -> Estimate:
        """Estimate the mean of the first set minus the mean of the second.

        Args:
            first: Values of the first set; NaN is left out.
            second: Values of the second set.

        Returns:
            The difference with its interval; NaN where a set has no value.
        """
        return self._estimate(first, second, lambda x, y, v, w: _mean(x, v) - _mean(y, w))

    def ratio(self, first: Values, second: Values) -> Estimate:
        """Estimate the mean of the first set divided by the mean of the second.

        Args:
            first: Values of the first set; NaN is left out.
            second: Values of the second set.

        Returns:
            The ratio with its interval; NaN where a set has no value or the second mean is 0.
        """

        def divided(x: Values, y: Values, v: Weights, w: Weights) -> Values:
            below = _mean(y, w)
            return _mean(x, v) / np.where(below == 0, np.nan, below)

        return self._estimate(first, second, divided)

    def cliffs_delta(self, first: Values, second: Values) -> Estimate:
        """Estimate P(an example of the first set is higher) - P(it is lower).

        The effect size assumes nothing about the distributions; scores between 0 and 1 often pile up at both ends.
        Source: Cliff 1993, Dominance statistics, Psychological Bulletin 114(3).

        Args:
            first: Values of the first set; NaN is left out.
            second: Values of the second set.

        Returns:
            Cliff's delta with its interval, from -1 to 1; 0 where neither set dominates.
        """
        return self._estimate(first, second, _dominance)

    def _estimate(
        self,
        first: Values,
        second: Values,
        statistic: Callable[[Values, Values, Weights, Weights], Values],
    ) -> Estimate:
        """Estimate a statistic over the values that are not NaN; a pair counts where neither value is NaN."""
        if self._partner is not None:
            second = second[self._partner]
        kept = [~np.isnan(first), ~np.isnan(second)]
        if self._partner is not None:
            kept = [kept[0] & kept[1]] * 2
        x, y = first[kept[0]], second[kept[1]]
        if not len(x) or not len(y):
            return Estimate(np.nan, np.nan, np.nan, 0)
        n = len(x) if self._partner is not None else len(x) + len(y)
        value = float(statistic(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0])
        n_clusters = [len(set(cluster[keep])) for cluster, keep in zip(self._clusters, kept, strict=True)]
        if min(n_clusters) < 2 or np.isnan(value):
            return Estimate(value, np.nan, np.nan, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = statistic(x, y, self._weights[0][:, kept[0]], self._weights[1][:, kept[1]])
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), n)


def _pairing(first: Sequence[Example], second: Sequence[Example]) -> Pairing:
    ids = [[example.id for example in examples] for examples in (first, second)]
    if all(ids[0]) and len(set(ids[0])) == len(ids[0]) and sorted(ids[0]) == sorted(ids[1]):
        return "ids"
    groups = [{example.group for example in examples} for examples in (first, second)]
    return "groups" if groups[0] == groups[1] and len(groups[0]) > 1 and "" not in groups[0] else "none"


def _clusters(examples: Sequence[Example]) -> Int[np.ndarray, " example"]:
    return clusters([example.group for example in examples])


def _mean(values: Values, weights: Weights) -> Values:
    return (weights @ values) / weights.sum(1)


def _dominance(x: Values, y: Values, v: Weights, w: Weights) -> Values:
    _, rank = np.unique(np.concatenate([x, y]), return_inverse=True)
    n_ranks = int(rank.max()) + 1
    ours, theirs = (np.zeros((n_ranks, len(v))) for _ in range(2))
    np.add.at(ours, rank[: len(x)], v.T)
    np.add.at(theirs, rank[len(x) :], w.T)
    up_to = theirs.cumsum(0)
    total = up_to[-1]
    above_minus_below = (up_to - theirs) - (total - up_to)
    return (ours * above_minus_below).sum(0) / (ours.sum(0) * total)
