"""Results of base and control under a test, kept for the next unlearned model of the same base and control."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dissect.stress.core.case import Case
from dissect.stress.core.result import StressResult
from dissect.stress.core.storage import as_parts, as_record, from_parts
from unlearning.common.errors import InputError
from unlearning.common.runs import read_frame, write_bytes, write_frame, write_json


def attacked(
    name: str, test: Callable[[Case], StressResult], case: Case, shared: Path | None, *, compares_models: bool = False
) -> StressResult:
    """Run a test; attack base and control only if the directory holds no result of theirs yet.

    Args:
        name: Name of the test.
        test: The test.
        case: Models and facts.
        shared: Directory for this base, control, facts and options of tests; None to attack every model.
        compares_models: Whether the test's values for one model depend on another model than the base
            (`dissect.stress.catalogue.Entry.compares_models`). Such a test is run on all models; it may itself keep
            what it found in the directory, by `once`.

    Returns:
        The result for all models.

    Raises:
        InputError: The test raises it, or the files in the directory cannot be read.
    """
    if shared is None or compares_models:
        return test(replace(case, shared=shared))
    record = shared / f"{name}.json"
    if not record.exists():
        found = test(case)
        kept = {part: rows for part, frame in as_parts(found).items() if (rows := _of_others(frame)) is not None}
        for part, rows in kept.items():
            write_frame(shared / f"{part}.parquet", rows)
        # The record is written last: without it, an interrupted test is run again on every model.
        write_json(record, {"parts": list(kept)})
        return found
    try:
        parts = {part: read_frame(shared / f"{part}.parquet") for part in json.loads(record.read_text())["parts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record}: not a record of a shared test ({error}). Remove {shared}.") from None
    found = test(replace(case, only="unlearned"))
    whole = {
        part: pd.concat([parts[part], own], ignore_index=True) if part in parts else own
        for part, own in as_parts(found).items()
    }
    return from_parts(as_record(found), whole)


def once(file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON file; compute it and write the file if there is none.

    Args:
        file: The file. Its name must tell everything that its content depends on.
        compute: Gives the content.

    Returns:
        The content.

    Raises:
        InputError: The file cannot be read.
    """
    if not file.exists():
        write_bytes(file, json.dumps(compute()).encode())  # keeps NaN, which `write_json` does not
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: not a record of a shared attack ({error}). Remove {file.parent}.") from None


def _of_others(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Return the rows of the other models than the unlearned one; None for a table without roles."""
    return frame[frame["role"] != "unlearned"] if "role" in frame else None
