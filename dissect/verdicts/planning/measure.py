"""How residuals vary over people and facts, from the results of tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dissect.stress.core.result import PLAIN, StressResult, controls_in
from dissect.stress.core.validity import invalid_variants
from dissect.verdicts.rule import Rule
from unlearning.common.bootstrap import clusters
from unlearning.common.errors import InputError


@dataclass(frozen=True, eq=False)
class FactResiduals:
    """What every fact adds to the numerator and to the denominator of residuals.

    Attributes:
        ours: Unlearned model above control (or floor), divided by the mean of base above control, [fact, entry]; its
            mean is rho.
        gap: Base above control, divided by its mean, [fact, entry]; its mean is 1.
        group: Group of every fact, [fact].
        n_controls: Number of controls; 0 against floors.
    """

    ours: pd.DataFrame
    gap: pd.DataFrame
    group: "pd.Series[str]"
    n_controls: int

    @property
    def rho(self) -> Float[np.ndarray, " entry"]:
        """The residuals."""
        return self.ours.to_numpy().mean(0) / self.gap.to_numpy().mean(0)

    def apart(self, rho: Float[np.ndarray, "*fact entry"] | None = None) -> Float[np.ndarray, "fact entry"]:
        """Return how far each fact is from a residual: a ratio of means varies by ours - rho gap."""
        return self.ours.to_numpy() - (self.rho if rho is None else rho) * self.gap.to_numpy()

    def of(self, kept: "pd.Series[bool]") -> "FactResiduals":
        """Return the same of some facts."""
        return FactResiduals(self.ours[kept], self.gap[kept], self.group[kept], self.n_controls)


def fact_residuals(results: Iterable[StressResult], rule: Rule) -> FactResiduals:
    """Return what every fact adds to the residuals of a rule's entries, each model at its strongest variant.

    Args:
        results: Results of the rule's tests, of one case.
        rule: The rule with its entries.

    Returns:
        The facts that have a value for all entries that have a residual, in the order of the rule's entries.

    Raises:
        InputError: No entry of the rule has a residual.
    """
    by_test = {result.test: result for result in results}
    of_entries = {
        str(entry): _of_entry(by_test[entry.test], entry.measure) for entry in rule.tests if entry.test in by_test
    }
    found = {name: one for name, one in of_entries.items() if one is not None}
    if not found:
        raise InputError("`results` must hold a test of the rule with a residual, and there is none")
    ours, gap = (pd.DataFrame({name: one[place] for name, one in found.items()}) for place in (0, 1))
    kept = ours.notna().all(axis=1) & gap.notna().all(axis=1)
    frame = next(result.frame for result in by_test.values())
    group = frame.drop_duplicates("example_index").set_index("example_index")["group"].loc[kept.index]
    roles = {role for entry in rule.tests if entry.test in by_test for role in by_test[entry.test].frame["role"]}
    return FactResiduals(ours[kept], gap[kept], group[kept], len(controls_in(roles)))


def _of_entry(result: StressResult, measure: str | None) -> tuple["pd.Series[float]", "pd.Series[float]"] | None:
    """Return unlearned model and base above control, for every fact, divided by the mean of the latter.

    None if no attack took hold, no fact has a value, chance is not known without a control, or the base knows no more
    than the control.
    """
    measure = measure or result.measure
    frame = result.frame
    tables = {
        str(role): rows.pivot(index="example_index", columns="variant", values="value")
        for role, rows in frame[frame["measure"] == measure].groupby("role")
    }
    controls = [tables[role] for role in controls_in(tables)]
    invalid = invalid_variants(result)
    variants = list(tables["unlearned"].columns)
    candidates = [name for name in variants if name not in invalid]
    took_hold = set(candidates) > {PLAIN} or PLAIN not in candidates or variants == [PLAIN]
    if not candidates or not took_hold or not (controls or measure in result.floors):
        return None
    if tables["unlearned"][candidates].isna().all(axis=None):
        return None
    before = [PLAIN] if PLAIN in tables["base"].columns else candidates

    def unknown(variants: Sequence[str]) -> "pd.Series[float] | float":
        if not controls:
            return result.floors[measure]
        return pd.concat([_best(table, variants) for table in controls], axis=1).mean(axis=1, skipna=False)

    gap = _best(tables["base"], before) - unknown(before)
    ours = _best(tables["unlearned"], candidates) - unknown(candidates)
    scale = gap[ours.notna()].mean()
    return (ours / scale, gap / scale) if scale > 0 else None


def _best(table: pd.DataFrame, variants: Sequence[str]) -> "pd.Series[float]":
    return table[table[list(variants)].mean().idxmax()]


def components(
    values: Float[np.ndarray, "fact entry"], group: Int[np.ndarray, " fact"]
) -> tuple[Float[np.ndarray, "entry entry"], Float[np.ndarray, "entry entry"]]:
    """Estimate the covariances between and within groups by the method of moments (one-way analysis of variance).

    Args:
        values: Values of every fact.
        group: Number of each fact's group, from 0.

    Returns:
        Covariance of the groups' true means, without negative eigenvalues, and covariance within a group; 0 within
        where every group has one fact.

    Raises:
        InputError: There are fewer than two groups.
    """
    sizes = np.bincount(group).astype(np.float64)
    n, n_groups = len(values), len(sizes)
    if n_groups < 2:
        raise InputError(f"`results` must be of at least 2 groups, got {n_groups}")
    means = np.stack([np.bincount(group, weights=column) for column in values.T], axis=1) / sizes[:, None]
    apart = means - values.mean(0)
    inside = values - means[group]
    over_groups = (apart * sizes[:, None]).T @ apart / (n_groups - 1)
    within = inside.T @ inside / (n - n_groups) if n > n_groups else np.zeros_like(over_groups)
    typical = (n - (sizes**2).sum() / n) / (n_groups - 1)
    found, vectors = np.linalg.eigh((over_groups - within) / typical)
    return (vectors * np.maximum(found, 0.0)) @ vectors.T, within


def groups_of(facts: FactResiduals) -> Int[np.ndarray, " fact"]:
    """Return the number of every fact's group, as the bootstrap counts them."""
    return clusters(facts.group.tolist())
