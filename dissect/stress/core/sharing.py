"""What base and never give under a test, kept for the next unlearned model of theirs."""

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

COMPARING = ("uds", "linear_probes", "tuned_lens", "patching", "restoration", "decomposition")
"""Tests that look at several models at once, and are run on all of them each time."""


def attacked(name: str, test: Callable[[Case], StressResult], case: Case, shared: Path | None) -> StressResult:
    """A test's result; base and never are attacked for the first unlearned model of theirs, and not again.

    Args:
        name: of the test.
        test: gives the result.
        case: models and facts.
        shared: directory of this base, never model, facts and options of tests; None to attack every model.

    Raises:
        InputError: what `test` raises, and what is kept cannot be read.
    """
    if shared is None or name in COMPARING:
        return test(case)
    record = shared / f"{name}.json"
    if not record.exists():
        found = test(case)
        kept = {part: rows for part, frame in as_parts(found).items() if (rows := _of_others(frame)) is not None}
        for part, rows in kept.items():
            write_frame(shared / f"{part}.parquet", rows)
        write_json(record, {"parts": list(kept)})  # last: what was cut off before it is attacked again
        return found
    try:
        parts = {part: read_frame(shared / f"{part}.parquet") for part in json.loads(record.read_text())["parts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record}: not what a verdict keeps ({error}); remove {shared}") from None
    found = test(replace(case, only="unlearned"))
    whole = {
        part: pd.concat([parts[part], own], ignore_index=True) if part in parts else own
        for part, own in as_parts(found).items()
    }
    return from_parts(as_record(found), whole)


def _of_others(frame: pd.DataFrame) -> pd.DataFrame | None:
    return frame[frame["role"] != "unlearned"] if "role" in frame else None
