"""Helpers of all result tables: estimates as columns, rows as plain data, null models as one arm, titles."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from unlearning.common.bootstrap import Estimate


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate as the columns `name`, `name_low` and `name_high`."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as plain data that JSON can hold."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def with_mean_null(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Replace the rows of all null models by one arm, `null`, their mean for every example.

    Args:
        frame: A table with a column `arm`, where null models are `null-0`, `null-1` and so on.
        keys: The columns that identify a row within an arm; other columns of numbers are averaged.

    Returns:
        The table with the rows of `null` at the end; the same table where there is no null model.
    """
    is_null = frame["arm"].str.startswith("null-")
    if not is_null.any():
        return frame
    nulls = frame[is_null]
    numbers = [name for name in nulls.columns if nulls[name].dtype == np.float64]
    mean = nulls.groupby(list(keys), sort=False)[numbers].mean().reset_index()
    mean["arm"] = "null"
    for name in map(str, frame.columns):
        if name.endswith("undefined"):  # a mean over models has no single reason
            mean[name] = ""
    return pd.concat([frame[~is_null], mean], ignore_index=True)


def pair_title(provenance: Mapping[str, Any]) -> str:
    """Return `base → unlearned`, with the last parts of the paths where both are directories."""
    names = [str(provenance[name]) for name in ("base", "unlearned")]
    if all(os.sep in name for name in names):
        names = [os.path.basename(name.rstrip(os.sep)) for name in names]
    return " → ".join(names)
