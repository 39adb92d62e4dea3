"""`python -m benchmarks.verdict`: CPU seconds of a verdict on a built-in pair, by test and by model.

The reference beside this file (`reference.json`) was measured at the commit that it names, before attacks ran on
the base as well and searched rates, with `python -m benchmarks.verdict --repeats 4 --json FILE`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, check_target, describe_machine, set_threads, write_record
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

if TYPE_CHECKING:
    from rich.table import Table

REFERENCE = "reference.json"

_EXAMPLES = """\b
Examples:
  python -m benchmarks.verdict
  python -m benchmarks.verdict --unlearned demo:rmu --repeats 5 --json runs/verdict.json
  python -m benchmarks.verdict --quick --json -
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    unlearned: Annotated[str, typer.Option(metavar="U", help="Built-in unlearned model.")] = "demo:npo",
    budget: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    limit: Annotated[int | None, typer.Option(min=4, help="Use at most so many forget facts.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Verdicts; numbers are medians over them.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One verdict on 8 facts, to see that it works.")] = False,
    json_to: JsonOption = None,
) -> None:
    """Measure a verdict's CPU seconds by test, then once more by model, and set them against the reference.

    CPU seconds, because other processes change them less than the wall time. What they still change shows in the
    yardstick, a fixed piece of work that is timed before and after each verdict; the ratio to the reference is given
    as measured, and in multiples of the yardstick.
    """
    if quick:
        limit, repeats = 8, 1
    check_target(json_to)
    set_threads(threads)

    import torch

    from benchmarks.verdict.clock import cost_of, run_verdict, split_by_model
    from dissect.stress.catalogue import BUDGETS
    from dissect.zoo import pairs
    from unlearning.common.progress import Progress

    if budget not in BUDGETS:
        raise InputError(f"--budget must be {', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}, got {budget}")
    known = [pair.unlearned for pair in pairs()]
    if unlearned not in known:
        raise InputError(f"--unlearned must be one of {', '.join(known)}, got {unlearned}")

    call = run_verdict(unlearned, budget, limit)
    costs = []
    with Progress(repeats + 1, "judging") as bar:
        for _ in range(repeats):
            costs.append(cost_of(call))
            bar.advance(1)
        models = split_by_model(call)
        bar.advance(1)
    record = {
        "unlearned": unlearned,
        "budget": budget,
        "limit": limit,
        **describe_machine(torch.device("cpu")),
        "verdicts": [asdict(cost) for cost in costs],
        **medians([asdict(cost) for cost in costs]),
        "models": models,
    }
    record["against_reference"] = against(record, reference())
    write_record(record, json_to)
    _show(record, to_stderr=json_to == "-")


def medians(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the medians over several verdicts.

    Args:
        costs: Fields of `benchmarks.verdict.clock.Cost`, one mapping per verdict.

    Returns:
        The same fields.
    """
    numbers = ("cpu_s", "wall_s", "peak_memory_bytes", "yardstick_s")
    tests = dict.fromkeys(name for cost in costs for name in cost["tests"])
    return {name: statistics.median(cost[name] for cost in costs) for name in numbers} | {
        "tests": {test: statistics.median(cost["tests"].get(test, 0.0) for cost in costs) for test in tests}
    }


def reference() -> dict[str, Any]:
    """Return the reference that is stored beside this file."""
    found: dict[str, Any] = json.loads(files("benchmarks.verdict").joinpath(REFERENCE).read_text(encoding="utf-8"))
    return found


def against(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float] | None:
    """Return how many times as much as the reference a verdict takes.

    Args:
        record: The record of this run.
        other: The record of the reference.

    Returns:
        Ratios of the CPU seconds, of the CPU seconds in multiples of the yardstick, and of the peak memory; None where
        the reference is of another pair, budget, limit or number of threads.
    """
    same = ("unlearned", "budget", "limit", "threads")
    if any(record[name] != other[name] for name in same):
        return None
    cpu = record["cpu_s"] / other["cpu_s"]
    return {
        "cpu": cpu,
        "cpu_in_yardsticks": cpu / (record["yardstick_s"] / other["yardstick_s"]),
        "peak_memory": record["peak_memory_bytes"] / other["peak_memory_bytes"],
    }


def table(record: Mapping[str, Any]) -> "Table":
    """Return CPU seconds by test, in one verdict on all models, and on each model by itself."""
    from rich.box import SIMPLE
    from rich.table import Table

    then = reference()["tests"] if record["against_reference"] else {}
    roles = list(dict.fromkeys(role for spent in record["models"].values() for role in spent))
    title = f"CPU seconds, {record['unlearned']}, {record['budget']}; right: each test on one model alone"
    found = Table(box=SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for heading in ("test", "verdict", "reference", *roles):
        found.add_column(heading, no_wrap=True, justify="left" if heading == "test" else "right")
    rows = {**record["tests"], "the verdict": record["cpu_s"]}
    then = {**then, "the verdict": sum(then.values())} if then else {}
    for test, seconds in rows.items():
        alone = record["models"].get(test, {})
        cells = [seconds, then.get(test), *(alone.get(role) for role in roles)]
        found.add_row(test, *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return found


def _show(record: Mapping[str, Any], *, to_stderr: bool) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    console.print(table(record))
    lines = [
        f"{record['processor']}, {record['threads']} threads; medians of {len(record['verdicts'])} verdicts: "
        f"{record['cpu_s']:.1f} CPU seconds, {record['wall_s']:.1f} s of wall time, "
        f"{record['peak_memory_bytes'] / 2**20:.0f} MiB above the start; yardstick {record['yardstick_s']:.2f} s."
    ]
    ratios = record["against_reference"]
    if ratios is None:
        lines.append("The reference is of another pair, budget, limit or number of threads.")
    else:
        lines.append(
            f"Of the reference: {ratios['cpu']:.2f} times the CPU seconds, {ratios['cpu_in_yardsticks']:.2f} times in "
            f"multiples of the yardstick, {ratios['peak_memory']:.2f} times the memory."
        )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m benchmarks.verdict", arguments, interrupted="nothing was written")
