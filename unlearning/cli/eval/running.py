"""Evaluate a model and show the metrics: the common part of the `unlearn eval` commands."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.cli.eval.options import ControlOptions, RunOptions
from unlearning.common.terminal import console as make_console
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from rich.table import Table

    from unlearning.evaluation.harness import Evaluation


def run_benchmark(name: str, model: str, control: ControlOptions, run: RunOptions, **options: Any) -> None:
    """Evaluate a model, write its run directory and show the metrics.

    Args:
        name: Name of the benchmark.
        model: Name of the evaluated model.
        control: Values of the options that name the control.
        run: Values of the options that every benchmark has.
        **options: Values of the benchmark's own options.
    """
    from unlearning import evaluate

    out = run.out or Path("runs") / f"eval-{name}-{short_name(model)}"
    evaluation = evaluate(
        name,
        model=model,
        control=control.control,
        control_result=control.control_result,
        output_dir=out,
        device=run.device,
        dtype=run.dtype,
        batch_size=run.batch_size,
        allow_pickle=run.allow_pickle,
        trust_remote_code=run.trust_remote_code,
        progress=not run.quiet,
        **options,
    )
    if run.as_json:
        write_json({**evaluation.summary(), "run": str(out)})
    elif not run.quiet:
        show(evaluation, out)


def show(evaluation: "Evaluation", out: Path) -> None:
    """Print the metrics as a table, the metrics that were left out, the notes, and the run directory.

    Args:
        evaluation: Result of the benchmark.
        out: Run directory.
    """
    from rich.measure import Measurement

    console, table = make_console(), metrics_table(evaluation)
    # A table cut to the terminal's width would show wrong numbers; a narrow terminal wraps the lines instead.
    wide = make_console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
    summary = evaluation.summary()
    for name, reason in summary["left_out"].items():
        console.print(f"left out: {name} ({_with_flags(reason)})", soft_wrap=True, highlight=False, markup=False)
    for note in summary["notes"]:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(f"run {out}", soft_wrap=True, highlight=False, markup=False)


def metrics_table(evaluation: "Evaluation") -> "Table":
    """Return a table with one row per metric: value, control, difference, rows and direction."""
    from rich import box
    from rich.table import Table

    compared = evaluation.control is not None
    title = f"{evaluation.benchmark}: {evaluation.model}" + (f", control {evaluation.control}" if compared else "")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value [95 %]", no_wrap=True)
    if compared:
        table.add_column("control", no_wrap=True)
        table.add_column("difference [95 %]", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("direction", overflow="fold")
    for name, record in evaluation.summary()["metrics"].items():
        cells = [name, _with_interval(record, "value", "low", "high")]
        if compared:
            cells.append(_number(record.get("control")))
            cells.append(_with_interval(record, "difference", "difference_low", "difference_high"))
        table.add_row(*cells, str(record["n"]), _direction(record["direction"]))
    return table


def short_name(model: str) -> str:
    """Return a model's name as part of a directory's name."""
    return Path(model).name.replace(":", "-") or "model"


def _with_flags(reason: str) -> str:
    """Replace arguments in backticks by their flags, which follow from the arguments' names in these commands."""
    reason = re.sub(r"`(\w+)=False`", lambda found: f"--no-{found[1].replace('_', '-')}", reason)
    return re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", reason)


def _direction(direction: str) -> str:
    """Return a metric's direction in a word or two; a dash for a descriptive metric."""
    return "-" if direction.startswith("descriptive") else direction.removesuffix(" is better")


def _with_interval(record: dict[str, Any], value: str, low: str, high: str) -> str:
    if record.get(value) is None:
        return ""
    if record.get(low) is None:
        return _number(record[value])
    return f"{_number(record[value])} [{_number(record[low])}, {_number(record[high])}]"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.2e}" if value and abs(value) < 5e-4 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
