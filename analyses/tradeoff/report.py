"""What trajectories say: from finished training runs to one table, the front, and utility at the same forgetting.

A trajectory is what one run measured of `unlearn eval tofu` while it trained (option `benchmark`), step by step.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unlearning.checkpoints.locate import RECORD
from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.model_utility import harmonic_mean

PREFIX = "tofu_"
QUALITY, DISTANCE, FORGET, UTILITY = (
    "forget_quality",
    "forget_quality_statistic",
    "forget_probability",
    "retain_utility",
)
"""Columns: the KS p-value against the control, the same test's D, and two scores of the answers."""

UTILITY_PARTS = ("retain_probability", "retain_truth_ratio")
"""What utility is the harmonic mean of: the parts of model utility that a run can measure without generating, on the
retain questions. Real authors and world facts are left out: models as small as these never knew any."""


def read_trajectories(runs: Sequence[Path]) -> pd.DataFrame:
    """Read the evaluations of finished runs of `unlearn train`.

    Args:
        runs: Directories of the runs.

    Returns:
        One row per evaluation. Columns: `split`, `name` (of the run's directory, without its seed), `method`, `seed`,
        `step`, `retain_utility`, and the benchmark's metrics.

    Raises:
        InputError: A directory holds no finished run, or a run that did not evaluate the benchmark.
    """
    rows = []
    for run in runs:
        try:
            record = json.loads((run / RECORD).read_text(encoding="utf-8"))
            configuration, options = record["configuration"], record["configuration"]["options"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{run}: no {RECORD} of `unlearn train` there; name the directory of a run") from None
        if not record.get("finished"):
            raise InputError(f"{run}: the run is not finished; resume it, or leave it out")
        lines = [line for line in record["evaluations"] if PREFIX + QUALITY in line]
        if not lines:
            raise InputError(
                f"{run}: it did not measure forget quality while it trained; train it with --set benchmark=tofu:SPLIT "
                "--set benchmark_control=NEVER"
            )
        split = str(options["benchmark"]).partition(":")[2]
        seed = int(options["seed"])
        name = run.name.removesuffix(f"-seed{seed}")
        for line in lines:
            metrics = {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(PREFIX)}
            rows.append(
                {
                    "split": Path(split).stem,
                    "name": name,
                    "method": configuration["method"],
                    "seed": seed,
                    "step": int(line["step"]),
                    **metrics,
                }
            )
    frame = pd.DataFrame(rows)
    frame[UTILITY] = harmonic_mean(*(frame[part].to_numpy(dtype=np.float64) for part in UTILITY_PARTS))
    return frame


def front(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points that no other point beats.

    A point beats another if its forget quality and its utility are both at least as high, and one of them is higher.

    Args:
        points: Rows with `forget_quality` and `retain_utility`.

    Returns:
        The front, in order of rising utility.
    """
    quality, utility = (points[column].to_numpy() for column in (QUALITY, UTILITY))
    beaten = [
        bool((((quality >= q) & (utility >= u)) & ((quality > q) | (utility > u))).any())
        for q, u in zip(quality, utility, strict=True)
    ]
    return points[~np.array(beaten)].sort_values(UTILITY, kind="stable")


def best_steps(trajectories: pd.DataFrame) -> pd.DataFrame:
    """Return each run at the step of its highest forget quality (the earliest of several), and at its end.

    Args:
        trajectories: Table of `read_trajectories`.

    Returns:
        Columns `split`, `name`, `seed`, `step`, `forget_quality`, `forget_quality_d`, `retain_utility`, the same of the
        last step as `last_...`, and `start_utility`, the base's.
    """
    rows = []
    for (split, name, seed), run in trajectories.groupby(["split", "name", "seed"], sort=False):
        ordered = run.sort_values("step")
        best, last = ordered.iloc[int(ordered[QUALITY].to_numpy().argmax())], ordered.iloc[-1]
        rows.append(
            {
                "split": split,
                "name": name,
                "seed": seed,
                "step": best["step"],
                **{column: best[column] for column in (QUALITY, DISTANCE, UTILITY)},
                "last_step": last["step"],
                **{f"last_{column}": last[column] for column in (QUALITY, DISTANCE, UTILITY)},
                "start_utility": ordered.iloc[0][UTILITY],
            }
        )
    return pd.DataFrame(rows)


def at_forget_level(trajectories: pd.DataFrame, level: float) -> pd.DataFrame:
    """Utility where the answers to be forgotten have become so improbable: methods compared at the same forgetting.

    Between two evaluations both are taken as linear in each other. A run that never comes so far has no utility there.

    Args:
        trajectories: as `read_trajectories` gives them.
        level: forget probability.

    Returns:
        Columns `split`, `name`, `seed`, `retain_utility` (NaN where the level is not reached).
    """
    rows = []
    for (split, name, seed), run in trajectories.groupby(["split", "name", "seed"], sort=False):
        ordered = run.sort_values("step")
        forget, utility = ordered[FORGET].to_numpy(), ordered[UTILITY].to_numpy()
        below = np.flatnonzero(forget <= level)
        found = np.nan
        if len(below):
            place = int(below[0])
            found = utility[place]
            if place:
                share = (forget[place - 1] - level) / (forget[place - 1] - forget[place])
                found = utility[place - 1] + share * (utility[place] - utility[place - 1])
        rows.append({"split": split, "name": name, "seed": seed, UTILITY: found})
    return pd.DataFrame(rows)


def findings(trajectories: pd.DataFrame, level: float) -> pd.DataFrame:
    """Return `best_steps` with `utility_at_level`, the utility at the forget probability `level`."""
    table = best_steps(trajectories)
    at_level = at_forget_level(trajectories, level).rename(columns={UTILITY: "utility_at_level"})
    return table.merge(at_level, on=["split", "name", "seed"], how="left")


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, lowest and highest over the seeds of each split and name, and the number of seeds."""
    keys = ["split", "name"]
    numbers = [column for column in table.columns if column not in (*keys, "seed")]
    grouped = table.groupby(keys, sort=False)
    parts: dict[str, pd.Series] = {"seeds": grouped.size()}
    for column in numbers:
        parts[column] = grouped[column].mean()
        parts[f"{column}_low"], parts[f"{column}_high"] = grouped[column].min(), grouped[column].max()
    return pd.DataFrame(parts).reset_index()


def ranged(row: "pd.Series[float]", column: str) -> str:
    """Format a mean with the range of the seeds as a table's cell; empty if no seed has a value."""
    value, low, high = (float(row[name]) for name in (column, f"{column}_low", f"{column}_high"))
    if np.isnan(value):
        return "not reached"
    if row["seeds"] == 1 or low == high:
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 5e-3 else f"{value:.2f}"
