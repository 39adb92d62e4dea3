"""Stress results on disk: one table per test, and a record of everything else.

Runs of earlier versions stay readable: names that have changed since are replaced when a result is read.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dissect.stress.core.result import StressResult

_SEPARATOR = "--"
"""Between the name of a test and the name of one of its further tables."""

_OLD_TESTS = {"expressed": "without_attack"}
"""Current names of tests by their names in earlier versions."""

_OLD_ROLES = {"never": "control"}
"""Current names of roles by their names in earlier versions."""


def as_parts(result: StressResult) -> dict[str, pd.DataFrame]:
    """Return the tables of a result by the names of their files."""
    tables = {f"{result.test}{_SEPARATOR}{name}": table for name, table in result.tables.items()}
    return {result.test: result.frame, **tables}


def as_record(result: StressResult) -> dict[str, Any]:
    """Return everything of a result but its tables, as plain data for JSON."""
    return {
        "test": result.test,
        "level": result.level,
        "measure": result.measure,
        "proves": result.proves,
        "settings": dict(result.settings),
        "seconds": result.seconds,
        "floors": dict(result.floors),
        "notes": list(result.notes),
        "seed": result.seed,
        "tables": list(result.tables),
    }


def has_parts(record: Mapping[str, Any], parts: Mapping[str, pd.DataFrame]) -> bool:
    """Return whether every table of a result is there; one may have been cut short on the disk.

    Args:
        record: What `as_record` gave.
        parts: The tables that can be read, by the names of the files.
    """
    return {record["test"], *(f"{record['test']}{_SEPARATOR}{name}" for name in record["tables"])} <= parts.keys()


def from_parts(record: Mapping[str, Any], parts: Mapping[str, pd.DataFrame]) -> StressResult:
    """Put a result together from what `as_record` and `as_parts` gave, in this or an earlier version.

    Args:
        record: What `as_record` gave.
        parts: What `as_parts` gave, by the names of the files.

    Returns:
        The result, with the current names of test, evidence level and roles.
    """
    test = record["test"]
    return StressResult(
        test=current_test(test),
        level=record["level"] if "level" in record else record["rung"],
        measure=record["measure"],
        frame=_with_current_roles(parts[test]),
        proves=record["proves"],
        settings=record["settings"],
        seconds=record["seconds"],
        floors=record["floors"],
        notes=tuple(record["notes"]),
        seed=record["seed"],
        tables={name: _with_current_roles(parts[f"{test}{_SEPARATOR}{name}"]) for name in record["tables"]},
    )


def current_test(name: str) -> str:
    """Return the current name of a test that may have had another name in an earlier version."""
    return _OLD_TESTS.get(name, name)


def _with_current_roles(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the current names of roles, in its columns `role` and `source` and in column names."""
    for old, new in _OLD_ROLES.items():
        frame = frame.rename(columns={name: re.sub(rf"\b{old}\b", new, str(name)) for name in frame.columns})
        for column in ("role", "source"):
            if column in frame:
                frame = frame.assign(**{column: frame[column].replace(old, new)})
    return frame


def one_table(results: Iterable[StressResult]) -> pd.DataFrame:
    """Return the rows of all results in one tidy table, with the columns `test` and `level` in front."""
    frames = []
    for result in results:
        frame = result.frame.copy()
        frame.insert(0, "test", result.test)
        frame.insert(1, "level", result.level)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
