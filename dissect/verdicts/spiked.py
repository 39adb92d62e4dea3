"""Spike-ins of a verdict: made once, with the attacks that the verdict ran, and kept in its run directory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import with_distractors
from dissect.stress.core.result import StressResult
from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.spike_ins.run import ATTACKS, FEWEST, Attack, spike_ins
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.runs import Run, read_frame, write_frame

RECORD = "spike_ins"
"""Entry of `run.json`, written after the tables: without it, spike-ins that were interrupted are made again."""

_TABLES = ("spike_ins", "spike_ins--stages", "spike_ins--people")


def check_number(n: int | None) -> None:
    """Check the number of invented people.

    Args:
        n: The number; None for no spike-ins.

    Raises:
        InputError: It is too small or odd.
    """
    if n is None:
        return
    check_at_least("spike_ins", n, FEWEST)
    if n % 2:
        raise InputError(
            f"`spike_ins` must be even, got {n}: half of the invented people are taught and hidden, the others never "
            f"shown. Give {n + 1}"
        )


def holds_all(run: Run, n: int | None) -> bool:
    """Check whether a run directory holds a finished verdict and its spike-ins.

    Args:
        run: The open run.
        n: Number of invented people that is asked for; None for no spike-ins.

    Returns:
        True if nothing is left to compute.

    Raises:
        InputError: It holds spike-ins of another number.
    """
    kept = run.record.get(RECORD)
    if kept is not None and n is not None and kept["settings"]["n"] != n:
        raise InputError(
            f"`spike_ins` must be {kept['settings']['n']} in {run.path}, which holds the spike-ins of so many people, "
            f"got {n}. Give another directory as `out`"
        )
    return run.is_complete and (n is None or kept is not None)


def spiked(
    n: int | None,
    case: Case,
    results: Sequence[StressResult],
    tests: Mapping[str, Attack],
    prompts: Prompts,
    run: Run | None,
) -> SpikeIns | None:
    """Return the spike-ins of a verdict: those of its run directory, or new ones, which are then kept there.

    Args:
        n: Number of invented people; None makes no new ones.
        case: Models and facts of the verdict.
        results: What the verdict's tests found; the user's facts are not attacked again.
        tests: The tests of the verdict by name.
        prompts: All forget prompts, to invent people from.
        run: The open run directory; None to keep nothing.

    Returns:
        The spike-ins, with a reason where they failed; None without any.
    """
    kept = None if run is None else read_spike_ins(run.path, run.record)
    if kept is not None or n is None:
        return kept
    found = {result.test: result for result in results if result.test in ATTACKS and result.test in tests}
    try:
        made = _made(n, case, found, tests, prompts)
    except InputError as error:
        # Both name the number of people, which has another name here.
        reason = str(error).replace("`n`", "`spike_ins`")
        made = SpikeIns.failed(f"The spike-ins failed: {reason}", n=n, seed=case.seed)
    if run is not None:
        keep_spike_ins(run, made)
    return made


def _made(
    n: int, case: Case, found: Mapping[str, StressResult], tests: Mapping[str, Attack], prompts: Prompts
) -> SpikeIns:
    """Make spike-ins with the attacks that the verdict ran.

    Returns:
        The spike-ins.

    Raises:
        InputError: The verdict ran none of the attacks, nobody can be invented, or an attack cannot be run on them.
    """
    if not found:
        raise InputError(f"the verdict ran none of the attacks that can be done to them ({', '.join(ATTACKS)})")
    attacks = {name: tests[name] for name in ATTACKS if name in found}
    if case.control is not None and any(item.wrong for item in case.forget.prompts.items):
        # Among distractors that somebody wrote, ranks are on another scale than those of invented people.
        case = replace(case, forget=with_distractors(case.forget.prompts, from_file=False, seed=case.seed))
        found = {}
    return spike_ins(case, n=n, attacks=attacks, found=found, prompts=prompts)


def keep_spike_ins(run: Run, found: SpikeIns) -> None:
    """Write spike-ins into a run directory.

    Args:
        run: The open run.
        found: The spike-ins.
    """
    for name, table in found.parts().items():
        write_frame(run.path / "tables" / f"{name}.parquet", table)
    run.note(**{RECORD: found.record()})


def read_spike_ins(path: Path, record: Mapping[str, Any]) -> SpikeIns | None:
    """Read the spike-ins of a run directory.

    Args:
        path: The directory.
        record: Its `run.json`.

    Returns:
        The spike-ins; None if there are none.

    Raises:
        InputError: A table is missing or broken.
    """
    if record.get(RECORD) is None:
        return None
    return SpikeIns.from_parts(
        record[RECORD], {name: read_frame(path / "tables" / f"{name}.parquet") for name in _TABLES}
    )
