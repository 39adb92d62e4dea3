"""Results of base and control under a test, kept for the next unlearned model of the same base and control."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dissect.stress.core.case import Case
from dissect.stress.core.result import StressResult
from dissect.stress.core.storage import as_parts, as_record, from_parts
from unlearning.common.errors import InputError
from unlearning.common.runs import read_frame, write_frame, write_json


def attacked(name: str, test: Callable[[Case], StressResult], case: Case, shared: Path | None) -> StressResult:
    """Run a test; attack base and control only if the directory holds no result of theirs yet.

    Args:
        name: Name of the test.
        test: The test. With a directory, its values for one model must not depend on another model than the base:
            give None for tests that compare models (`dissect.stress.catalogue.Entry.compares_models`).
        case: Models and facts.
        shared: Directory for this base, control, facts and options of tests; None to attack every model.

    Returns:
        The result for all models.

    Raises:
        InputError: The test raises it, or the files in the directory cannot be read.
    """
    if shared is None:
        return test(case)
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


def _of_others(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Return the rows of the other models than the unlearned one; None for a table without roles."""
    return frame[frame["role"] != "unlearned"] if "role" in frame else None
