"""Two sets of examples against each other: differences, ratios and dominance, with 95 % bootstrap intervals.

Two sets that have nothing in common are resampled each by itself. Two that belong together are resampled together,
so that the interval is that of paired values:

    ids      both hold the same examples by name: pairs are drawn (whole groups of pairs where there are groups)
    groups   both ask about the same two or more groups (concepts, people): groups are drawn, each with its
             examples of both sets

Groups are drawn whole, as in `intervals.Bootstrap`, with percentile intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from unlearning.common.bootstrap import LEVEL, Estimate

Pairing = Literal["ids", "groups", "none"]
Values = Float[np.ndarray, " example"]
Weights = Float[np.ndarray, "draw example"]

_DRAWS = 2000


@dataclass(frozen=True)
class Example:
    """What of an example says where it belongs.

    Attributes:
        id: its name, or "" where it has none of its own.
        group: its group, or "".
    """

    id: str
    group: str


class TwoSamples:
    """Two sets of examples, and how often each example is in each bootstrap draw.

    Args:
        first: the examples of the one set, in the order of the values to come.
        second: those of the other.
        seed: of the draws.
        draws: how many.

    Attributes:
        pairing: what the two sets share.
    """

    def __init__(self, first: Sequence[Example], second: Sequence[Example], *, seed: int, draws: int = _DRAWS) -> None:
        self.pairing: Pairing = _pairing(first, second)
        self._partner: Int[np.ndarray, " example"] | None = None
        self._keys = (_clusters(first), _clusters(second))
        if self.pairing == "ids":
            place = {example.id: index for index, example in enumerate(second)}
            self._partner = np.array([place[example.id] for example in first])
            self._keys = (self._keys[0], self._keys[0])
        # The same stream of random numbers for both draws the same clusters.
        streams = (0, 1) if self.pairing == "none" else (0, 0)
        self._weights = tuple(
            _drawn(keys, np.random.default_rng([seed, stream]), draws)
            for keys, stream in zip(self._keys, streams, strict=True)
        )

    def difference(self, first: Values, second: Values) -> Estimate:
        """Mean of the first minus mean of the second."""
        return self._estimate(first, second, lambda x, y, v, w: _mean(x, v) - _mean(y, w))

    def ratio(self, first: Values, second: Values) -> Estimate:
        """Mean of the first divided by mean of the second; NaN where that is 0."""

        def divided(x: Values, y: Values, v: Weights, w: Weights) -> Values:
            below = _mean(y, w)
            return _mean(x, v) / np.where(below == 0, np.nan, below)

        return self._estimate(first, second, divided)

    def cliffs_delta(self, first: Values, second: Values) -> Estimate:
        """P(an example of the first is higher) - P(it is lower), from -1 to 1; 0 where neither dominates.

        An effect size without assumptions on the distributions, which scores between 0 and 1 with heaps at both
        ends do not fulfil. Source: Cliff 1993, Dominance statistics, Psychological Bulletin 114(3).
        """
        return self._estimate(first, second, _dominance)

    def _estimate(
        self,
        first: Values,
        second: Values,
        statistic: Callable[[Values, Values, Weights, Weights], Values],
    ) -> Estimate:
        """A statistic of both sets over the values that are numbers; a pair counts where both are."""
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
        clusters = [
            {key for key, keep in zip(keys, which, strict=True) if keep}
            for keys, which in zip(self._keys, kept, strict=True)
        ]
        if min(map(len, clusters)) < 2 or np.isnan(value):
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


def _clusters(examples: Sequence[Example]) -> list[str]:
    """What is drawn whole: groups; examples where there is no group, or only one."""
    keys = [example.group or f"\0{index}" for index, example in enumerate(examples)]
    return keys if len(set(keys)) > 1 else [str(index) for index in range(len(keys))]


def _drawn(keys: Sequence[str], generator: np.random.Generator, draws: int) -> Weights:
    """How often each example is in each draw; the same for the same generator and set of keys."""
    cluster = np.unique(list(keys), return_inverse=True)[1]
    n = int(cluster.max()) + 1
    return generator.multinomial(n, np.full(n, 1 / n), size=draws)[:, cluster].astype(np.float64)


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
