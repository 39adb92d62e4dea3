"""What resists: one row per model, and the means over the seeds as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.resistance.attacks import OTHER, SAME, most_recovered, steps_to_recover
from analyses.resistance.run import CONTROL, Found

CHANCE = 0.5
"""Mean rank of answers that a model does not know, in place of a control's."""

SHARES = {SAME: 0.5, OTHER: 0.25}
"""What counts as recovered, as a share of what the base knows beyond the control. Relearning other facts seldom brings
half of these back."""


def models_of(found: Sequence[Found]) -> pd.DataFrame:
    """Return one row per model.

    Args:
        found: The models, each world's control among them where it has one.

    Returns:
        Columns `world`, `method`, `seed`, `forget`, `retain`, `steps`, `same_facts` and `other_facts` (steps of
        relearning until the share in `SHARES` is back; infinity: not within the study's steps), `most` (largest share
        that relearning other facts brings back), `rounded` (share that is there after rounding), `label`, `score`,
        `low`, `high`.
    """
    rows = []
    for one in found:
        control = _control_of(one, found)
        curves = {attack: [row for row in one.curves if row["attack"] == attack] for attack in SHARES}
        nothing = {attack: [row for row in control if row["attack"] == attack] for attack in SHARES}
        start = {attack: nothing[attack][0]["rank"] for attack in SHARES}
        beyond = {attack: one.base[attack] - start[attack] for attack in SHARES}
        steps = {
            attack: steps_to_recover(curves[attack], start[attack] + share * beyond[attack])
            for attack, share in SHARES.items()
        }
        rows.append(
            {
                **{name: getattr(one, name) for name in ("world", "method", "seed", "forget", "retain", "steps")},
                "same_facts": steps[SAME],
                "other_facts": steps[OTHER],
                "most": most_recovered(curves[OTHER], nothing[OTHER], beyond[OTHER]),
                "rounded": float("nan") if one.rounded is None else (one.rounded - start[SAME]) / beyond[SAME],
                **{name: getattr(one, name) for name in ("label", "score", "low", "high")},
            }
        )
    return pd.DataFrame(rows)


def _control_of(one: Found, found: Sequence[Found]) -> Sequence[Mapping[str, Any]]:
    """Return the rows of the control of a model's world; where there is none, rows at chance."""
    for other in found:
        if (other.world, other.seed, other.method) == (one.world, one.seed, CONTROL):
            return other.curves
    return [{**row, "rank": CHANCE} for row in one.curves]


def markdown(models: pd.DataFrame, most_steps: int) -> str:
    """Return a table of a line per world and method, with means over the seeds.

    Args:
        models: Rows of `models_of`.
        most_steps: Largest number of steps of relearning.

    Returns:
        Markdown. Steps are geometric means over the seeds; one that was not reached counts as twice the most, and
        makes the mean a lower bound.
    """
    head = ["world", "method", "forget / retain left", "steps, the same facts", "steps, other facts"]
    head += ["most, other facts", "after 4 bits", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for (world, method), here in models.groupby(["world", "method"], sort=False):
        left = "" if method == CONTROL else f"{here['forget'].mean():.2f} / {here['retain'].mean():.2f}"
        cells = [
            str(world),
            f"`{method}`" if method != CONTROL else "never trained on them",
            left,
            *(geometric_mean(here[name], most_steps) for name in ("same_facts", "other_facts")),
            *("" if here[name].isna().all() else f"{here[name].mean():.2f}" for name in ("most", "rounded")),
            _verdict(here),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def geometric_mean(steps: pd.Series, most_steps: int) -> str:
    """Return the geometric mean of numbers of steps as text; `> ` before it if some were not reached."""
    if np.isinf(steps).all():
        return f"> {most_steps}"
    if (steps == 0).all():
        return "0"
    mean = float(np.exp(np.log(steps.clip(lower=0.5, upper=2 * most_steps)).mean()))
    return f"{'> ' if np.isinf(steps).any() else ''}{mean:.2g}"


def _verdict(here: pd.DataFrame) -> str:
    labels = here["label"].dropna()
    if labels.empty:
        return ""
    counts = labels.value_counts()
    words = ", ".join(str(label) if len(labels) == 1 else f"{n} {label}" for label, n in counts.items())
    return words if here["score"].isna().all() else f"{words} ({here['score'].mean():.2f})"
