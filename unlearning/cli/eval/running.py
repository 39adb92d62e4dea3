"""What every `unlearn eval` command does alike: load the models, run the benchmark, show what it found."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from rich.table import Table

    from unlearning.data.question_answer import Wrapping
    from unlearning.evaluation.harness import Benchmark, Evaluation
    from unlearning.evaluation.subject import Subject


@dataclass(frozen=True)
class Loading:
    """How models are loaded, as `open_subject` takes it."""

    device: str | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def open(self, name: str) -> "Subject":
        """A model by name."""
        from unlearning.evaluation.subject import open_subject

        return open_subject(
            name,
            device=self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Retain:
    """The retain model, or its results.

    Raises:
        InputError: both are given.
    """

    model: str | None = None
    result: Path | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.result is not None:
            raise InputError("--retain-model and --retain-result both name the retain model's numbers; give one")


@dataclass(frozen=True)
class Report:
    """What is written and shown."""

    out: Path | None = None
    quiet: bool = False
    as_json: bool = False


def run_benchmark(
    name: str,
    prepare: "Callable[[Subject], Benchmark]",
    model: str,
    *,
    loading: Loading,
    report: Report,
    batch_size: int,
    retain: Retain | None = None,
) -> None:
    """Evaluate a model, write its run directory and show the metrics.

    Args:
        name: of the benchmark.
        prepare: makes it ready for a model.
        model: its name.
        loading: of models.
        report: where results go.
        batch_size: rows at a time.
        retain: what the numbers are compared with, where the benchmark compares.
    """
    from unlearning.common.runs import is_run
    from unlearning.evaluation.harness import evaluate

    out = report.out or Path("runs") / f"eval-{name}-{short_name(model)}"
    retain = retain or Retain()
    if retain.result is not None and not is_run(retain.result):
        raise InputError(f"--retain-result {retain.result}: not a run directory (no run.json in it)")
    evaluation = evaluate(
        prepare,
        loading.open(model),
        retain=loading.open(retain.model) if retain.model is not None else retain.result,
        out=out,
        batch_size=batch_size,
        progress=not report.quiet,
    )
    if report.as_json:
        write_json({**evaluation.summary(), "run": str(out)})
    elif not report.quiet:
        show(evaluation, out)


def wrapping_of(subject: "Subject", template: str | None, chat: bool, *, default: str | None = None) -> "Wrapping":
    """What is put around questions, from `--template` and `--chat`.

    Raises:
        InputError: both are given, the template has no place for the question, or the tokenizer has no chat template.
    """
    from unlearning.data.chat import chat_format
    from unlearning.data.question_answer import DEFAULT_TEMPLATE, Wrapping

    if template is not None and chat:
        raise InputError("--template and --chat both wrap the question; give one of them")
    written = None if template is None else template.replace("\\n", "\n")
    return Wrapping(written or default or DEFAULT_TEMPLATE, chat_format(subject.tokenizer) if chat else None)


def show(evaluation: "Evaluation", out: Path) -> None:
    """The metrics as a table, what was left out, and where everything is."""
    from rich.console import Console
    from rich.measure import Measurement

    console, table = Console(), metrics_table(evaluation)
    # Never cut: half a number is another number. A terminal that is too narrow wraps the lines itself.
    wide = Console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
    summary = evaluation.summary()
    for name, reason in summary["left_out"].items():
        console.print(f"left out: {name} ({reason})", soft_wrap=True, highlight=False, markup=False)
    for note in summary["notes"]:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(f"run {out}", soft_wrap=True, highlight=False, markup=False)


def metrics_table(evaluation: "Evaluation") -> "Table":
    """One line a metric."""
    from rich import box
    from rich.table import Table

    compared = evaluation.retain is not None
    title = f"{evaluation.benchmark}: {evaluation.model}" + (f", against {evaluation.retain}" if compared else "")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value [95 %]", no_wrap=True)
    if compared:
        table.add_column("retain model", no_wrap=True)
        table.add_column("difference [95 %]", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("good", overflow="fold")
    for name, record in evaluation.summary()["metrics"].items():
        cells = [name, _with_interval(record, "value", "low", "high")]
        if compared:
            cells.append(_number(record.get("retain_model")))
            cells.append(_with_interval(record, "difference", "difference_low", "difference_high"))
        table.add_row(*cells, str(record["n"]), _good(record["direction"]))
    return table


def short_name(model: str) -> str:
    """A model's name as part of a directory's."""
    return Path(model).name.replace(":", "-") or "model"


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    sys.stderr.write(f"unlearn: {text}\n")


def _good(direction: str) -> str:
    return "-" if direction.startswith("describes") else direction.removesuffix(" is better")


def _with_interval(record: dict[str, Any], value: str, low: str, high: str) -> str:
    if record.get(value) is None:
        return ""
    if record.get(low) is None:
        return _number(record[value])
    return f"{_number(record[value])} \\[{_number(record[low])}, {_number(record[high])}]"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.2e}" if value and abs(value) < 5e-4 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
