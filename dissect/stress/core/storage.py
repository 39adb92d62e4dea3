"""Stress results on disk: a table each, and what is said of it."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dissect.stress.core.result import StressResult

_SEPARATOR = "--"
"""Between a test's name and that of one of its further tables."""


def as_parts(result: StressResult) -> dict[str, pd.DataFrame]:
    """The tables of a result by the names of their files."""
    tables = {f"{result.test}{_SEPARATOR}{name}": table for name, table in result.tables.items()}
    return {result.test: result.frame, **tables}


def as_record(result: StressResult) -> dict[str, Any]:
    """What is said of a result, as JSON takes it."""
    return {
        "test": result.test,
        "rung": result.rung,
        "measure": result.measure,
        "proves": result.proves,
        "settings": dict(result.settings),
        "seconds": result.seconds,
        "floors": dict(result.floors),
        "notes": list(result.notes),
        "seed": result.seed,
        "tables": list(result.tables),
    }


def from_parts(record: Mapping[str, Any], parts: Mapping[str, pd.DataFrame]) -> StressResult:
    """The result that `as_record` and `as_parts` took apart."""
    test = record["test"]
    return StressResult(
        test=test,
        rung=record["rung"],
        measure=record["measure"],
        frame=parts[test],
        proves=record["proves"],
        settings=record["settings"],
        seconds=record["seconds"],
        floors=record["floors"],
        notes=tuple(record["notes"]),
        seed=record["seed"],
        tables={name: parts[f"{test}{_SEPARATOR}{name}"] for name in record["tables"]},
    )


def one_table(results: Iterable[StressResult]) -> pd.DataFrame:
    """All results in one tidy table: their rows with the columns `test` and `rung` before them."""
    frames = []
    for result in results:
        frame = result.frame.copy()
        frame.insert(0, "test", result.test)
        frame.insert(1, "rung", result.rung)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
