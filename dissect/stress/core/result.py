"""The result of a stress test: values of every example under every variant of an attack, and the residual rho.

    rho = (attacked unlearned - attacked control) / (base - control)

rho = 0: under the same attack, the unlearned model scores no more than the control. rho = 1: all of the base's
knowledge is back. An attack has variants (rates, layers, strengths). The strongest variant counts, chosen separately
for the unlearned model and the control, in the data and in every bootstrap draw. The candidates are the variants that
took hold (`dissect.stress.core.validity`), and the model without attack: what it shows by itself counts as well. With
several controls, the control's score is the mean over them, each at its own strongest variant.

The mean of the strongest of several variants lies above that of each. A control's strongest variant does so as much,
which cancels, but a floor does not. So against a floor, the lower end of several variants allows for the choice: it is
lower than rho by as much as, in 97.5 % of the draws, no variant exceeds its own value.

Draws of few groups are spread around the value as Student's t wants it (`unlearning.common.bootstrap.widening`): by
percentiles alone, a model asked about two people would have an interval of almost no width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dissect.scoring.run_result import Copied
from dissect.stress.core.distractors import Facts
from dissect.stress.core.scores import RANK_FLOOR, FactScores
from dissect.stress.core.validity import invalid_variants
from unlearning.common.bootstrap import LEVEL, clusters, times_drawn, widening

DRAWS = 2000
"""Number of bootstrap draws."""

PLAIN = ""
"""The variant of a model without attack."""

Against = Literal["control", "floor"]

EvidenceLevel = Literal[0, 1, 2, 3, 4]

EVIDENCE_LEVELS: Mapping[int, str] = {
    0: "without attack",
    1: "decodable",
    2: "machinery survives",
    3: "contents survive",
    4: "weights retain",
}
"""What a residual above zero shows, by the evidence level of the test; higher levels are stronger claims."""

COLUMNS = ("role", "variant", "measure", "example", "example_index", "group", "value")
"""Columns of `StressResult.frame`."""


@dataclass(frozen=True)
class Residual:
    """rho with its 95 % interval (bootstrap over groups, or over examples if there are no groups).

    Attributes:
        rho: The residual; None if it is not defined.
        low: Lower end of the interval; None if there is no interval.
        high: Upper end of the interval; None if there is no interval.
        n: Number of examples.
        variant: The attack's strongest variant on the unlearned model.
        against: What the unlearned model is compared with: `control`, or `floor` (`StressResult.floors`).
        reason: Why rho is not defined; an empty string if it is.
        draws: rho in every bootstrap draw, widened for few groups, [draw]; all tests of one case use the same draws.
        choice: Against a floor with several variants, the largest excess of a variant over its own value in every
            draw, [draw], for the lower end; else None.
        n_groups: Number of groups, or of examples without one, that the draws are over.
        n_controls: Number of controls; 0 against a floor.
        run_variance: Variance between training runs of a model without the knowledge, in units of rho², estimated from
            the differences between the controls and without what people contribute to them (`_run_variance`); it may
            come out below zero. None with fewer than two controls.
    """

    rho: float | None
    low: float | None
    high: float | None
    n: int
    variant: str
    against: Against
    reason: str = ""
    draws: Float[np.ndarray, " draw"] | None = field(default=None, repr=False, compare=False)
    choice: Float[np.ndarray, " draw"] | None = field(default=None, repr=False, compare=False)
    n_groups: int = 0
    n_controls: int = 0
    run_variance: float | None = None

    @property
    def excess(self) -> Float[np.ndarray, " draw"] | None:
        """By how much rho, or a variant against a floor, exceeds its own value in every draw; None without draws."""
        if self.choice is not None or self.draws is None or self.rho is None:
            return self.choice
        return self.draws - self.rho


@dataclass(eq=False, kw_only=True)
class StressResult:
    """A finished stress test.

    Attributes:
        test: Name of the test, such as `relearn_disjoint`.
        level: Evidence level (a key of `EVIDENCE_LEVELS`).
        measure: The measure that decides; `frame` has others as well.
        frame: One row per role (`base`, `unlearned`, `control`, `control 2` and so on), variant (`""`: without attack),
            measure and example, with the columns `COLUMNS`. A higher `value` is more knowledge. A test that only reads
            has no rows without attack.
        proves: What a residual above zero shows, and what a residual of zero does not show.
        settings: Everything that the numbers depend on besides models and facts.
        seconds: Wall time in seconds.
        floors: The score of a model without the knowledge, by measure, where it is known without a control.
        notes: What was left out, and why.
        seed: Random seed of the bootstrap draws.
        tables: Further tables, such as curves over steps, by name.
    """

    test: str
    level: EvidenceLevel
    measure: str
    frame: Copied[pd.DataFrame] = Copied()
    proves: str
    settings: Mapping[str, Any]
    seconds: float
    floors: Mapping[str, float] = field(default_factory=lambda: {"rank": RANK_FLOOR})
    notes: tuple[str, ...] = ()
    seed: int = 0
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    _frame: pd.DataFrame = field(init=False, repr=False)

    def residual(self, measure: str | None = None) -> Residual:
        """Return rho of the strongest variant, chosen separately for the unlearned model and the control.

        Args:
            measure: The measure; by default the one that decides.

        Returns:
            The residual with its interval. It is not defined if no variant of the attack took hold.
        """
        measure = measure or self.measure
        unlearned = self._frame[(self._frame["measure"] == measure) & (self._frame["role"] == "unlearned")]
        variants = [str(variant) for variant in unlearned["variant"].unique()]
        invalid = invalid_variants(self)
        variants.sort(key=lambda variant: variant == PLAIN)  # of two that are equally strong the attack is named
        chosen = [variant for variant in variants if variant not in invalid]
        if any(variant != PLAIN for variant in variants) and not any(variant != PLAIN for variant in chosen):
            said = "; ".join(f"{variant}: {invalid[variant]}" for variant in variants if variant != PLAIN)
            n = unlearned.loc[unlearned["variant"] == variants[0], "value"].notna().sum()
            against: Against = "control" if (self._frame["role"] == "control").any() else "floor"
            return Residual(None, None, None, int(n), variants[0], against, f"the attack did not take hold: {said}")
        return self._residual(measure, chosen)

    def residuals(self) -> pd.DataFrame:
        """Return the residual of every measure and variant by itself.

        Returns:
            One row per measure and variant with the columns `measure`, `variant`, `valid` (whether the variant took
            hold), `rho`, `low`, `high`, `n`, `against` and `reason` (why the variant is not valid, or why rho is not
            defined), and the means `base`, `unlearned` and `control` of the models under the variant (NaN if there are
            none); `control` is the mean over all controls.
        """
        rows = []
        invalid = invalid_variants(self)
        for measure in self._frame["measure"].unique():
            here = self._frame[self._frame["measure"] == measure]
            for variant in here.loc[here["role"] == "unlearned", "variant"].unique():
                found = self._residual(measure, [variant])
                means = here[here["variant"] == variant].groupby("role")["value"].mean()
                of_controls = means[controls_in(means.index)]
                rows.append(
                    {
                        "measure": measure,
                        "variant": variant,
                        "valid": variant not in invalid,
                        "rho": found.rho,
                        "low": found.low,
                        "high": found.high,
                        "n": found.n,
                        "against": found.against,
                        "reason": invalid.get(variant, found.reason),
                        **{role: means.get(role, np.nan) for role in ("base", "unlearned")},
                        "control": of_controls.mean() if len(of_controls) else np.nan,
                    }
                )
        return pd.DataFrame(rows)

    def _residual(self, measure: str, chosen: list[str]) -> Residual:
        """Return rho of the strongest of the chosen variants."""
        tables = _tables(self._frame, measure)
        floor = self.floors.get(measure) if "control" not in tables else None
        against: Against = "control" if "control" in tables else "floor"
        means = tables["unlearned"][chosen].mean()
        if means.isna().all():
            return Residual(None, None, None, 0, chosen[0], against, f"no fact has a value of {measure}")
        strongest = str(means.idxmax())
        n = int(tables["unlearned"][strongest].notna().sum())
        if "control" not in tables and floor is None:
            reason = f"no floor of {measure} is known without a control"
            return Residual(None, None, None, n, strongest, against, reason)
        cluster = clusters(self._frame.drop_duplicates("example_index").sort_values("example_index")["group"].tolist())
        n_groups = len(set(cluster[tables["unlearned"][strongest].notna()]))
        weights = times_drawn(cluster, draws=DRAWS, seed=self.seed)
        weights = np.concatenate([np.ones((1, len(cluster))), weights])
        # The denominator compares the models without attack; a test that only reads has no such rows, so it compares
        # the models under the chosen variants.
        plain = PLAIN in tables["base"].columns
        before = [PLAIN] if plain else [name for name in chosen if name in tables["base"].columns]
        known = _best(tables["base"], before, weights)
        if floor is None:
            controls = controls_in(tables)
            unknown = np.mean([_best(tables[role], before, weights) for role in controls], axis=0)
            of_controls = np.stack([_best(tables[role], chosen, weights) for role in controls])
            theirs = of_controls.mean(axis=0)
        else:
            unknown = theirs = np.full(len(weights), floor)
            of_controls = np.empty((0, len(weights)))
        ours = _means(tables["unlearned"], chosen, weights)
        gap = known - unknown
        if not _quantile(gap[1:], (1 - LEVEL) / 2) > 0:
            reason = f"the {measure} of the base is not above the {against}, so there is no knowledge to look for"
            return Residual(None, None, None, n, strongest, against, reason)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_variants = (ours - theirs[:, None]) / gap[:, None]
        rho = _highest(of_variants)
        has_interval = n_groups > 1
        factor = widening(n_groups) if has_interval else 1.0
        draws = rho[0] + factor * (rho[1:] - rho[0])
        low, high = (_quantile(draws, q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        choice = None
        if floor is not None and len(chosen) > 1:
            choice = factor * _highest(of_variants[1:] - of_variants[0])
            low = float(rho[0]) - _quantile(choice, (1 + LEVEL) / 2)
        return Residual(
            rho=float(rho[0]),
            low=low if has_interval else None,
            high=high if has_interval else None,
            n=n,
            variant=strongest,
            against=against,
            draws=draws,
            choice=choice,
            n_groups=n_groups,
            n_controls=len(of_controls),
            run_variance=_run_variance(of_controls, gap),
        )


def controls_in(roles: Iterable[object]) -> list[str]:
    """Return the roles that are controls, in their order: `control`, `control 2` and so on."""
    return [str(role) for role in roles if str(role).partition(" ")[0] == "control"]


def _run_variance(of_controls: Float[np.ndarray, "control draw"], gap: Float[np.ndarray, " draw"]) -> float | None:
    """Estimate how much training runs of a model without the knowledge differ, in units of rho².

    The variance over the controls, s², holds the variance between runs and, because each run knows other people by
    chance, the sampling of people. The bootstrap adds the latter once more, so that the mean of s² over the draws
    exceeds s² by it: s² - (mean of s² over the draws - s²) is without it. The interval over people covers it already.

    Args:
        of_controls: Score of every control, first in the data and then in the bootstrap draws.
        gap: Difference between base and controls without attack, in the same order.

    Returns:
        The variance, which may come out below zero; None with fewer than two controls.
    """
    if len(of_controls) < 2:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        found = of_controls.var(axis=0, ddof=1) / gap**2
    drawn = found[1:][np.isfinite(found[1:])]
    return float(2 * found[0] - (drawn.mean() if len(drawn) else found[0]))


def _tables(frame: pd.DataFrame, measure: str) -> dict[str, pd.DataFrame]:
    """Return one table per role, with examples in order as rows and variants as columns."""
    here = frame[frame["measure"] == measure]
    examples = np.sort(frame["example_index"].unique())
    found = {}
    for role, rows in here.groupby("role", sort=False):
        order = list(dict.fromkeys(rows["variant"]))
        table = rows.pivot(index="example_index", columns="variant", values="value")
        found[str(role)] = table.reindex(index=examples, columns=order)
    return found


def _best(
    table: pd.DataFrame, variants: list[str], weights: Float[np.ndarray, "draw example"]
) -> Float[np.ndarray, " draw"]:
    """Return the highest of the variants' means in every draw."""
    return _highest(_means(table, variants, weights))


def _means(
    table: pd.DataFrame, variants: list[str], weights: Float[np.ndarray, "draw example"]
) -> Float[np.ndarray, "draw variant"]:
    """Return the variants' means in every draw, each over the examples that have a value; NaN if none has one."""
    values = table[variants].to_numpy(dtype=np.float64)
    kept = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights @ np.where(kept, values, 0.0)) / (weights @ kept.astype(np.float64)))


def _highest(values: Float[np.ndarray, "draw variant"]) -> Float[np.ndarray, " draw"]:
    """Return the highest value of every draw, leaving out NaN; NaN if there is no other."""
    return np.asarray(np.fmax.reduce(values, axis=1))


def _quantile(draws: Float[np.ndarray, " draw"], q: float) -> float:
    finite = draws[np.isfinite(draws)]
    return float(np.quantile(finite, q)) if len(finite) else float("nan")


def fact_rows(facts: Facts, scored: Iterable[tuple[str, str, FactScores]]) -> pd.DataFrame:
    """Return the table of a test that attacks models and then scores facts.

    Args:
        facts: The scored facts.
        scored: Role, variant and scores.

    Returns:
        A table with the columns `COLUMNS`.
    """
    columns = ((role, variant, scores.columns()) for role, variant, scores in scored)
    return value_rows(facts, columns)


def value_rows(
    facts: Facts, measured: Iterable[tuple[str, str, Mapping[str, Float[np.ndarray, " fact"]]]]
) -> pd.DataFrame:
    """Return the table of a test that has measures of its own.

    Args:
        facts: The scored facts.
        measured: Role, variant, and one value per fact by measure.

    Returns:
        A table with the columns `COLUMNS`.
    """
    frames = []
    for role, variant, columns in measured:
        for measure, values in columns.items():
            frames.append(
                pd.DataFrame(
                    {
                        "role": role,
                        "variant": variant,
                        "measure": measure,
                        "example": [item.id for item in facts.prompts.items],
                        "example_index": np.arange(len(facts)),
                        "group": facts.groups,
                        "value": np.asarray(values, dtype=np.float64),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)[list(COLUMNS)]
