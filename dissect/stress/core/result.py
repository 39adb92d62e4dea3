"""The result of a stress test: values of every example under every variant of an attack, and the residual rho.

    rho = (attacked unlearned - attacked control) / (base - control)

rho = 0: under the same attack, the unlearned model scores no more than the control. rho = 1: all of the base's
knowledge is back. An attack has variants (learning rates, layers, strengths). The strongest variant counts, chosen
separately for the unlearned model and the control, in the data and in every bootstrap draw.
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
from unlearning.common.bootstrap import LEVEL, clusters, times_drawn

DRAWS = 2000
"""Number of bootstrap draws."""

PLAIN = ""
"""The variant of a model without attack."""

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
        draws: rho in every bootstrap draw, [draw]; all tests of one case use the same draws.
    """

    rho: float | None
    low: float | None
    high: float | None
    n: int
    variant: str
    against: Literal["control", "floor"]
    reason: str = ""
    draws: Float[np.ndarray, " draw"] | None = field(default=None, repr=False, compare=False)


@dataclass(eq=False, kw_only=True)
class StressResult:
    """A finished stress test.

    Attributes:
        test: Name of the test, such as `relearn_disjoint`.
        level: Evidence level (a key of `EVIDENCE_LEVELS`).
        measure: The measure that decides; `frame` has others as well.
        frame: One row per role (`base`, `unlearned`, `control`), variant (`""`: without attack), measure and example,
            with the columns `COLUMNS`. A higher `value` is more knowledge. A test that only reads has no rows without
            attack.
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
            The residual with its interval.
        """
        return self._residual(measure or self.measure, None)

    def residuals(self) -> pd.DataFrame:
        """Return the residual of every measure and variant by itself.

        Returns:
            One row per measure and variant with the columns `measure`, `variant`, `rho`, `low`, `high`, `n`, `against`
            and `reason`, and the means `base`, `unlearned` and `control` of the models under the variant (NaN if there
            are none).
        """
        rows = []
        for measure in self._frame["measure"].unique():
            here = self._frame[self._frame["measure"] == measure]
            for variant in here.loc[here["role"] == "unlearned", "variant"].unique():
                found = self._residual(measure, variant)
                means = here[here["variant"] == variant].groupby("role")["value"].mean()
                rows.append(
                    {
                        "measure": measure,
                        "variant": variant,
                        "rho": found.rho,
                        "low": found.low,
                        "high": found.high,
                        "n": found.n,
                        "against": found.against,
                        "reason": found.reason,
                        **{role: means.get(role, np.nan) for role in ("base", "unlearned", "control")},
                    }
                )
        return pd.DataFrame(rows)

    def _residual(self, measure: str, variant: str | None) -> Residual:
        tables = _tables(self._frame, measure)
        attacked = [name for name in tables["unlearned"].columns if name != PLAIN] or [PLAIN]
        chosen = attacked if variant is None else [variant]
        floor = self.floors.get(measure) if "control" not in tables else None
        against: Literal["control", "floor"] = "control" if "control" in tables else "floor"
        strongest = str(tables["unlearned"][chosen].mean().idxmax())
        n = int(tables["unlearned"][strongest].notna().sum())
        if "control" not in tables and floor is None:
            reason = f"no floor of {measure} is known without a control"
            return Residual(None, None, None, n, strongest, against, reason)
        groups = self._frame.drop_duplicates("example_index").sort_values("example_index")["group"].tolist()
        weights = times_drawn(clusters(groups), draws=DRAWS, seed=self.seed)
        weights = np.concatenate([np.ones((1, len(groups))), weights])
        # The denominator compares the models without attack; a test that only reads has no such rows, so it compares
        # the models under the chosen variants.
        plain = PLAIN in tables["base"].columns
        before = [PLAIN] if plain else [name for name in chosen if name in tables["base"].columns]
        known = _best(tables["base"], before, weights)
        if floor is None:
            unknown = _best(tables["control"], before, weights)
            ours, theirs = _best(tables["unlearned"], chosen, weights), _best(tables["control"], chosen, weights)
        else:
            unknown = theirs = np.full(len(weights), floor)
            ours = _best(tables["unlearned"], chosen, weights)
        gap = known - unknown
        if not _quantile(gap[1:], (1 - LEVEL) / 2) > 0:
            reason = f"the {measure} of the base is not above the {against}, so there is no knowledge to look for"
            return Residual(None, None, None, n, strongest, against, reason)
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (ours - theirs) / gap
        low, high = (_quantile(rho[1:], q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        has_interval = len(groups) > 1
        return Residual(
            rho=float(rho[0]),
            low=low if has_interval else None,
            high=high if has_interval else None,
            n=n,
            variant=strongest,
            against=against,
            draws=rho[1:],
        )


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
    """Return the highest of the variants' means in every draw, each over the examples that have a value."""
    values = table[variants].to_numpy(dtype=np.float64)
    kept = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(kept, values, 0.0)) / (weights @ kept.astype(np.float64))
    return np.asarray(np.nanmax(np.where(np.isnan(means), -np.inf, means), axis=1))


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
