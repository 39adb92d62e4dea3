"""What a stress test gives: values of every example under every variant of an attack, and the residual rho.

    rho = (attacked unlearned - attacked never) / (base - never)

0: the unlearned model gives no more than one that never knew, under the same attack; 1: all that the base knows is
back. An attack has variants (learning rates, layers, strengths); the worst case is taken, for the unlearned model and
for the never model alike, in the data and in every bootstrap draw.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dissect.stress.core.alternatives import Facts
from dissect.stress.core.scores import RANK_FLOOR, FactScores
from unlearning.common.bootstrap import LEVEL, clusters, times_drawn

DRAWS = 2000

PLAIN = ""
"""The variant of a model that was not attacked."""

Rung = Literal[0, 1, 2, 3, 4]

RUNGS: Mapping[int, str] = {
    0: "expressed",
    1: "decodable",
    2: "machinery survives",
    3: "contents survive",
    4: "weights retain",
}
"""The claim ladder: what a residual above zero in a test of that rung shows."""

COLUMNS = ("role", "variant", "measure", "example", "example_index", "group", "value")


@dataclass(frozen=True)
class Residual:
    """rho with its 95 % interval (bootstrap over groups, or over examples where there are none).

    Attributes:
        rho: None where it is not defined.
        low: lower end; None where there is no interval.
        high: upper end.
        n: examples behind it.
        variant: the attack's strongest variant on the unlearned model.
        against: `never`, or `floor`: what knowing nothing scores by construction.
        reason: why it is not defined; else "".
        draws: rho on every bootstrap draw; tests of one case share their draws.
    """

    rho: float | None
    low: float | None
    high: float | None
    n: int
    variant: str
    against: Literal["never", "floor"]
    reason: str = ""
    draws: Float[np.ndarray, " draw"] | None = field(default=None, repr=False, compare=False)


@dataclass(eq=False)
class StressResult:
    """A finished stress test.

    Attributes:
        test: its name, as `relearning`.
        rung: of the claim ladder (`RUNGS`): what a residual above zero shows.
        measure: the one that decides; others are beside it.
        frame: one row per role (`base`, `unlearned`, `never`), variant (`""`: not attacked), measure and example, with
            the columns `COLUMNS`; a higher `value` is more knowledge. A test that only reads has no rows that are not
            attacked.
        proves: one sentence: what a residual above zero shows, and what none does not.
        settings: everything that the numbers depend on beside models and facts.
        seconds: wall time.
        floors: what knowing nothing scores, by measure, where that is known without a never model.
        notes: what was left out, and why.
        seed: of the bootstrap draws.
        tables: what else the test found, as curves over steps, by name.
    """

    test: str
    rung: Rung
    measure: str
    frame: pd.DataFrame
    proves: str
    settings: Mapping[str, Any]
    seconds: float
    floors: Mapping[str, float] = field(default_factory=lambda: {"rank": RANK_FLOOR})
    notes: tuple[str, ...] = ()
    seed: int = 0
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def residual(self, measure: str | None = None) -> Residual:
        """The worst case over the attack's variants, for the unlearned and the never model alike.

        Args:
            measure: by default the one that decides.
        """
        return self._residual(measure or self.measure, None)

    def residuals(self) -> pd.DataFrame:
        """One row per measure and variant, each variant by itself: `measure`, `variant`, `rho`, `low`, `high`, `n`,
        `against`, `reason`, and the means `base`, `unlearned` and `never` under it."""
        rows = []
        for measure in self.frame["measure"].unique():
            here = self.frame[self.frame["measure"] == measure]
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
                        **{role: means.get(role, np.nan) for role in ("base", "unlearned", "never")},
                    }
                )
        return pd.DataFrame(rows)

    def _residual(self, measure: str, variant: str | None) -> Residual:
        tables = _tables(self.frame, measure)
        attacked = [name for name in tables["unlearned"].columns if name != PLAIN] or [PLAIN]
        chosen = attacked if variant is None else [variant]
        floor = self.floors.get(measure) if "never" not in tables else None
        against: Literal["never", "floor"] = "never" if "never" in tables else "floor"
        strongest = str(tables["unlearned"][chosen].mean().idxmax())
        n = int(tables["unlearned"][strongest].notna().sum())
        if "never" not in tables and floor is None:
            reason = f"{measure} has no value that a model must have that never knew; give a never model"
            return Residual(None, None, None, n, strongest, against, reason)
        groups = self.frame.drop_duplicates("example_index").sort_values("example_index")["group"].tolist()
        weights = times_drawn(clusters(groups), draws=DRAWS, seed=self.seed)
        weights = np.concatenate([np.ones((1, len(groups))), weights])
        # What is compared in the denominator: the models as they are, or where a test only reads, what it reads.
        plain = PLAIN in tables["base"].columns
        before = [PLAIN] if plain else [name for name in chosen if name in tables["base"].columns]
        known = _best(tables["base"], before, weights)
        if floor is None:
            nothing = _best(tables["never"], before, weights)
            ours, theirs = _best(tables["unlearned"], chosen, weights), _best(tables["never"], chosen, weights)
        else:
            nothing = theirs = np.full(len(weights), floor)
            ours = _best(tables["unlearned"], chosen, weights)
        gap = known - nothing
        if not _quantile(gap[1:], (1 - LEVEL) / 2) > 0:
            reason = f"base and {against} cannot be told apart by {measure}: there is no knowledge to look for"
            return Residual(None, None, None, n, strongest, against, reason)
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (ours - theirs) / gap
        low, high = (_quantile(rho[1:], q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        some = len(set(groups)) > 1 or len(groups) > 1
        return Residual(
            rho=float(rho[0]),
            low=low if some else None,
            high=high if some else None,
            n=n,
            variant=strongest,
            against=against,
            draws=rho[1:],
        )


def _tables(frame: pd.DataFrame, measure: str) -> dict[str, pd.DataFrame]:
    """For every role: examples in order as rows, variants as columns."""
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
    """The highest of the variants' means in every draw, each over the examples that have a value."""
    values = table[variants].to_numpy(dtype=np.float64)
    kept = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(kept, values, 0.0)) / (weights @ kept.astype(np.float64))
    return np.asarray(np.nanmax(np.where(np.isnan(means), -np.inf, means), axis=1))


def _quantile(draws: Float[np.ndarray, " draw"], q: float) -> float:
    finite = draws[np.isfinite(draws)]
    return float(np.quantile(finite, q)) if len(finite) else float("nan")


def fact_rows(facts: Facts, scored: Iterable[tuple[str, str, FactScores]]) -> pd.DataFrame:
    """The table of a test that attacks models and then asks facts.

    Args:
        facts: what was asked.
        scored: role, variant and scores.
    """
    columns = ((role, variant, scores.columns()) for role, variant, scores in scored)
    return value_rows(facts, columns)


def value_rows(
    facts: Facts, measured: Iterable[tuple[str, str, Mapping[str, Float[np.ndarray, " fact"]]]]
) -> pd.DataFrame:
    """The table of a test that has measures of its own.

    Args:
        facts: what was asked.
        measured: role, variant, and a value of every fact by measure.
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
