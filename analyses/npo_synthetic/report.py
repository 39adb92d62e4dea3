"""The numbers of NPO's synthetic experiment that a reader is shown: medians, orderings, growth."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from analyses.npo_synthetic.drawing import over_seeds
from analyses.npo_synthetic.fits import FOLLOWS, departures, growth_table
from analyses.npo_synthetic.methods import METRICS
from dissect.scoring.tidy import records

STEPS = (0, 100, 200, 300, 1000, 1200, 1975)
"""Of the comparison; with the last step evaluated, whichever it is."""
LIMIT_STEPS = (0, 1000, 2000, 5000)
ORDERED = ("forget_distance", "retain_distance")


def summary(frame: pd.DataFrame, limit_steps: int) -> dict[str, Any]:
    """Plain data, one record a row.

    Args:
        frame: the rows of `results.parquet`.
        limit_steps: of unlearning in the limit, of whose shares the fits are made.

    Returns:
        medians: of every metric in the comparison, with the range of the seeds.
        ordering: at the last step, by alpha and distance, best first.
        limit: the same medians where beta goes to 0.
        growth: the fits, means over the seeds with 95 % intervals.
        departures: when each beta has left gradient ascent.
    """
    comparison, limit = (frame[frame["experiment"] == name] for name in ("comparison", "limit"))
    medians = _medians(comparison, STEPS, ["alpha", "method", "step"])
    return {
        "n_seeds": int(frame["seed"].nunique()),
        "medians": medians,
        "ordering": _ordering(medians),
        "limit": _medians(limit, LIMIT_STEPS, ["method", "beta", "step"]),
        "growth": records(growth_table(limit, limit_steps)),
        "departures": records(departures(limit)),
    }


def _medians(frame: pd.DataFrame, steps: Sequence[int], keys: Sequence[str]) -> list[dict[str, Any]]:
    here = frame[frame["step"].isin([*steps, frame["step"].max()])]
    merged: pd.DataFrame | None = None
    for metric in METRICS:
        names = {"median": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
        one = over_seeds(here, keys, metric).rename(columns=names)
        merged = one if merged is None else merged.merge(one, on=list(keys))
    assert merged is not None
    return records(merged)


def _ordering(medians: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    last = max(row["step"] for row in medians)
    ends = [row for row in medians if row["step"] == last]
    return [
        {
            "alpha": alpha,
            "metric": metric,
            "step": last,
            "methods": [
                row["method"] for row in sorted((r for r in ends if r["alpha"] == alpha), key=lambda row: row[metric])
            ],
        }
        for alpha in dict.fromkeys(row["alpha"] for row in ends)
        for metric in ORDERED
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """Write the summary as Markdown tables."""
    parts = [*_median_tables(found), *_limit_table(found), *_growth_table(found)]
    return "\n".join(parts) + "\n"


def _median_tables(found: Mapping[str, Any]) -> Iterator[str]:
    medians = found["medians"]
    steps = list(dict.fromkeys(row["step"] for row in medians))
    for alpha in dict.fromkeys(row["alpha"] for row in medians):
        here = [row for row in medians if row["alpha"] == alpha]
        yield f"Forget / retain distance from the retrained model in nats, α = {alpha:g}, median of {_seeds(found)}\n"
        yield _row("method", *(f"step {step}" for step in steps))
        yield _row(*["---"] * (len(steps) + 1))
        for method in dict.fromkeys(row["method"] for row in here):
            cells = [
                f"{row['forget_distance']:.3g} / {row['retain_distance']:.3g}"
                for row in here
                if row["method"] == method
            ]
            yield _row(method, *cells)
        yield ""
    for order in found["ordering"]:
        name = order["metric"].replace("_", " ")
        yield f"α = {order['alpha']:g}, {name} at step {order['step']}, best first: {', '.join(order['methods'])}\n"


def _limit_table(found: Mapping[str, Any]) -> Iterator[str]:
    steps = list(dict.fromkeys(row["step"] for row in found["limit"]))
    left = {row["beta"]: row for row in found["departures"]}
    yield f"KL(fine-tuned ‖ model) on forget inputs / retain distance in nats, α = 1, median of {_seeds(found)}\n"
    yield _row("", *(f"step {step}" for step in steps), f"first step below {FOLLOWS:g} GA's KL (range)")
    yield _row(*["---"] * (len(steps) + 2))
    for name in dict.fromkeys(_name(row) for row in found["limit"]):
        rows = [row for row in found["limit"] if _name(row) == name]
        cells = [f"{row['forget_kl']:.3g} / {row['retain_distance']:.3g}" for row in rows]
        yield _row(name, *cells, _when(left.get(rows[0]["beta"])))
    yield ""


def _growth_table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "Growth of that KL with the steps t, mean over the seeds (their range) or [95 % interval]\n"
    yield _row("", "steps", "R², a + b t", "R², a + b log t", "p of KL ~ t^p", "q of dKL/dt ~ t^q")
    yield _row(*["---"] * 6)
    rows = [row for row in found["growth"] if row["metric"] == "forget_kl"]
    for first, last, name in dict.fromkeys((row["first_step"], row["last_step"], _name(row)) for row in rows):
        fits = {row["quantity"]: row for row in rows if row["first_step"] == first and _name(row) == name}
        cells = [
            *(_number(fits[key], "lowest", "highest", "({} to {})") for key in ("linear_r2", "logarithmic_r2")),
            *(_number(fits[key], "low", "high", "[{}, {}]") for key in ("power", "rate_power")),
        ]
        yield _row(name, f"{first} to {last}", *cells)
    yield "\nq is 0 for any line and -1 for any logarithm, wherever it begins."


def _seeds(found: Mapping[str, Any]) -> str:
    return f"{found['n_seeds']} seed" + ("s" if found["n_seeds"] > 1 else "")


def _name(row: Mapping[str, Any]) -> str:
    return str(row["method"]) if math.isnan(row["beta"]) else f"{row['method']}, β = {row['beta']:g}"


def _when(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if math.isnan(row["median"]):
        return "not in every seed"
    return f"{row['median']:.0f} ({row['earliest']:.0f} to {row['latest']:.0f})"


def _number(row: Mapping[str, Any], low: str, high: str, around: str) -> str:
    """Format a mean and two ends, if there are any."""
    if math.isnan(row["mean"]):
        return "none"
    mean, *ends = (f"{round(row[name], 3) + 0.0:.3f}" for name in ("mean", low, high))
    return mean if math.isnan(row[low]) else f"{mean} {around.format(*ends)}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
