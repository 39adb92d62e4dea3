"""`python -m benchmarks.processes`: the same sweep by one process and by several, one thread each."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, check_target, write_record
from benchmarks.shapes import find_shape
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

if TYPE_CHECKING:
    import pandas as pd

SHAPES = ("compute", "small", "tiny")
DEMO = "demo"
TOLERANCE = 1e-4
_KEYS = ["target", "kind", "site", "centre", "example"]

_EXAMPLES = """\b
Examples:
  python -m benchmarks.processes
  python -m benchmarks.processes --shape demo --repeats 5 --json runs/processes.json
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    processes: Annotated[int, typer.Option(help="Number of processes to compare with one.")] = 2,
    shape: Annotated[str, typer.Option(help=f"Model and prompts: {', '.join((*SHAPES, DEMO))}.")] = "compute",
    repeats: Annotated[int, typer.Option(help="Runs of each, in turns; times are medians.")] = 3,
    disk: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the pair and the runs.")] = Path(
        "runs/processes"
    ),
    json_to: JsonOption = None,
) -> None:
    """Time the sweep of `dissect patch`, loading left out, by one process and by several under torchrun."""
    if processes < 2:
        raise InputError(f"--processes {processes}: at least 2, to set against one")
    if repeats < 1:
        raise InputError(f"--repeats {repeats}: at least 1")
    if shape != DEMO:
        find_shape(shape, (*SHAPES, DEMO))
    check_target(json_to)

    from benchmarks.child import run_patch
    from benchmarks.memory import fresh

    arguments = [*what_to_sweep(shape, disk), "--control", "none", "--device", "cpu", "--quiet", "--json"]
    runs = {number: fresh(disk / f"run-{shape}-{number}") for number in (1, processes)}
    seconds: dict[int, list[float]] = {1: [], processes: []}
    for _ in range(repeats):
        for number, out in runs.items():
            finished = run_patch(arguments, fresh(out), processes=number, threads=1)
            seconds[number].append(finished.record["wall_time_s"])
    difference = largest_difference(runs[1], runs[processes])
    if difference > TOLERANCE:
        raise InputError(f"{processes} processes differ from one by {difference:.2g} in a KRS: see {disk}")
    medians = {number: statistics.median(times) for number, times in seconds.items()}
    record = {
        "shape": shape,
        "processes": processes,
        "threads_of_each": 1,
        "seconds": {str(number): times for number, times in seconds.items()},
        "speedup": medians[1] / medians[processes],
        "max_krs_difference": difference,
    }
    _show(record, medians, json_to)


def what_to_sweep(shape: str, disk: Path) -> list[str]:
    """Return the arguments that name the models and questions of a shape, and write them if they do not exist yet."""
    if shape == DEMO:
        return ["--base", "demo:base", "--unlearned", "demo:npo"]

    from benchmarks.memory import write_files

    found = find_shape(shape, SHAPES)
    files = write_files(found, disk / found.name)
    questions = files.folder / "questions.jsonl"
    return ["--base", str(files.base), "--unlearned", str(files.unlearned), "--data", str(questions)]


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the KRS of two runs, row by row.

    Args:
        one: Directory of a run.
        other: Directory of another run.

    Returns:
        The largest absolute difference.

    Raises:
        InputError: The runs hold other interventions or examples.
    """
    import pandas as pd

    ours, theirs = (_krs(pd.read_parquet(path / "results.parquet")) for path in (one, other))
    if not ours.index.equals(theirs.index) or not ours.isna().equals(theirs.isna()):
        raise InputError(f"{one} and {other} hold results of other interventions or examples")
    return float((ours - theirs).abs().max())


def _krs(frame: "pd.DataFrame") -> "pd.Series[float]":
    return frame.set_index(_KEYS)["krs"].sort_index()


def _show(record: dict[str, Any], medians: dict[int, float], json_to: str | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    write_record(record, json_to)
    table = Table("processes", "seconds", "times as fast", box=SIMPLE, title=f"{record['shape']}, one thread each")
    for number, seconds in medians.items():
        table.add_row(str(number), f"{seconds:.3g}", f"{medians[1] / seconds:.2f}")
    console = Console(stderr=json_to == "-")
    console.print(table)
    console.print(f"KRS agree to {record['max_krs_difference']:.1e}.", highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m benchmarks.processes", arguments, interrupted="the same command begins anew")


if __name__ == "__main__":
    main()
