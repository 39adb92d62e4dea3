"""Benchmarks and their evaluation: score the rows of each set, keep them, and compute metrics, next to a control's.

OUT/run.json           what the numbers depend on, versions, hashes, wall time
OUT/parts/*.parquet    finished rows of an evaluation that is not complete
OUT/results.parquet    one row per row of the data: `set`, `row`, `id`, `group`, and what was measured
OUT/control.parquet    the same of the control, if one is given
OUT/summary.json       every metric with interval, direction and meaning; what was left out, and why
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unlearning.common.cache import cache_directory
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.runs import (
    Run,
    computing,
    open_run,
    peak_memory_bytes,
    read_finished,
    read_frame,
    write_frame,
    write_json,
)
from unlearning.evaluation.statistics import Metric, combine
from unlearning.evaluation.subject import Subject

Row = dict[str, Any]
Rows = pd.DataFrame


@dataclass(frozen=True)
class Part:
    """One set of rows.

    Attributes:
        name: Name of the set, which becomes the column `set`.
        costs: Cost of each row, such as its number of tokens: rows of similar cost are scored together.
        score: Scores the rows at the given indices and returns one dictionary per index, in the same order. A value
            may be a number, a text, a truth value, None or a list of numbers; `id` and `group` identify the row.
        at_once: Number of rows that `score` is given at a time and that are kept together; None for the batch size.
    """

    name: str
    costs: Sequence[int]
    score: Callable[[Sequence[int]], list[Row]]
    at_once: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is ready to run on one model.

    Attributes:
        name: Name of the benchmark, as `unlearn eval` spells it.
        configuration: Everything that the rows depend on besides the model: hashes of the data, wrapping, lengths.
            Plain data. A control's results can be used only if their configuration is the same.
        parts: The sets of rows that are scored.
        summarise: Computes the metrics from the model's rows and the control's rows (None without a control). It is
            called with the control's rows alone, too.
        provenance: Other facts that are kept in `run.json`, such as file names.
        notes: Remarks for the reader, one line each.
    """

    name: str
    configuration: dict[str, Any]
    parts: Sequence[Part]
    summarise: Callable[[Rows, Rows | None], list[Metric]]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Prepare = Callable[[Subject], Benchmark]
"""Makes a benchmark ready for a model, whose tokenizer encodes the data."""

_COLUMNS = ("value", "low", "high", "n", "control", "difference", "difference_low", "difference_high", "direction")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of a benchmark on one model.

    Attributes:
        benchmark: Name of the benchmark.
        model: Name of the evaluated model.
        metrics: Metrics of the model.
        control_metrics: Metrics of the control; None without a control.
        control: Name of the control, or the directory of its results; None without a control.
        notes: Remarks for the reader, one line each.
    """

    benchmark: str
    model: str
    _rows: Rows
    metrics: Sequence[Metric]
    _control_rows: Rows | None = None
    control_metrics: Sequence[Metric] | None = None
    control: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> Rows:
        """One row per row of the data, with what was measured of it; a copy."""
        return self._rows.copy()

    @property
    def control_rows(self) -> Rows | None:
        """The control's rows, as `rows`; None without a control."""
        return None if self._control_rows is None else self._control_rows.copy()

    @property
    def frame(self) -> pd.DataFrame:
        """The metrics as a table, a copy.

        The index is the metric's name. Columns: `value`, `low`, `high` (95 % bootstrap interval; NaN where there is
        none), `n` (rows behind the value), `control` (the control's value), `difference` (model minus control),
        `difference_low`, `difference_high` (its interval; rows of both models are paired), and `direction`. Metrics
        that were left out are not in the table; `summary()["left_out"]` gives the reasons.
        """
        records = self.summary()["metrics"]
        rows = [{column: record.get(column) for column in _COLUMNS} for record in records.values()]
        frame = pd.DataFrame(rows, columns=list(_COLUMNS), index=pd.Index(list(records), name="metric"))
        numbers = [column for column in _COLUMNS if column not in ("n", "direction")]
        return frame.astype(dict.fromkeys(numbers, float))

    def __getitem__(self, name: str) -> float | None:
        """Return the value of a metric; None if the metric was left out.

        Raises:
            KeyError: The benchmark has no metric of this name.
        """
        for metric in self.metrics:
            if metric.name == name:
                return None if metric.estimate is None else metric.estimate.value
        raise KeyError(name)

    def summary(self) -> dict[str, Any]:
        """Return the metrics as plain data, as written to `summary.json`.

        Returns:
            `metrics` by name, each with `value`, `low`, `high`, `n`, `direction`, `meaning`, and with a control
            `control`, `difference`, `difference_low`, `difference_high`; `left_out`: the reason for each metric
            without a value; `rows`: the number of rows per set; `benchmark`, `model`, `control`, `notes`.
        """
        others = {metric.name: metric for metric in self.control_metrics or []}
        metrics = {metric.name: _record(metric, others.get(metric.name)) for metric in self.metrics if metric.estimate}
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "control": self.control,
            "rows": dict(Counter(map(str, self._rows["set"]))),
            "metrics": metrics,
            "left_out": {metric.name: metric.reason for metric in self.metrics if metric.estimate is None},
            "notes": list(self.notes),
        }


def evaluate(
    prepare: Prepare,
    subject: Subject,
    *,
    control: Subject | str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Run a benchmark on a model; an evaluation that was stopped continues where it stopped.

    Args:
        prepare: Makes the benchmark ready for a model; called for the model and for the control.
        subject: The model.
        control: A model never trained on the forget set, which is evaluated too (once: its results are cached under
            hashes of model, data and configuration), or the run directory of its finished evaluation.
        out: Run directory; nothing is written without it.
        batch_size: Number of rows scored at a time; no number depends on it.
        progress: Show a progress bar on stderr.

    Returns:
        The metrics and the rows behind them.

    Raises:
        InputError: The benchmark refuses the model or the data, `out` holds another run, or the control's results
            were computed with another configuration.
    """
    check_at_least("batch_size", batch_size, 1)
    benchmark = prepare(subject)
    rows, run = _rows(benchmark, subject, out, batch_size=batch_size, progress=progress)
    control_rows: Rows | None = None
    if control is not None:
        results = (
            remembered(prepare, control, batch_size=batch_size, progress=progress)
            if isinstance(control, Subject)
            else Path(control)
        )
        control_rows = read_control_rows(results, _configuration(benchmark, subject))
    evaluation = Evaluation(
        benchmark=benchmark.name,
        model=subject.name,
        _rows=rows,
        metrics=tuple(benchmark.summarise(rows, control_rows)),
        _control_rows=control_rows,
        control_metrics=None if control_rows is None else tuple(benchmark.summarise(control_rows, None)),
        control=None if control is None else control.name if isinstance(control, Subject) else str(control),
        notes=benchmark.notes,
    )
    if run is not None:
        if control_rows is not None:
            write_frame(run.path / "control.parquet", control_rows)
        write_json(run.path / "summary.json", evaluation.summary())
    return evaluation


def remembered(prepare: Prepare, subject: Subject, *, batch_size: int = 16, progress: bool = True) -> Path:
    """Return the run directory of a model's evaluation in the cache; evaluate the model if it is not there yet.

    A hash of the model's weights and of everything else that the numbers depend on names the directory.

    Args:
        prepare: Makes the benchmark ready for the model.
        subject: The model.
        batch_size: Number of rows scored at a time.
        progress: Show a progress bar on stderr.

    Returns:
        A run directory with a finished evaluation.
    """
    benchmark = prepare(subject)
    path = cache_directory("evaluation") / _digest(_configuration(benchmark, subject))
    _rows(benchmark, subject, path, batch_size=batch_size, progress=progress)
    return path


def read_control_rows(path: Path, configuration: dict[str, Any]) -> Rows:
    """Read the rows of a control's finished evaluation.

    Args:
        path: Run directory of the control's evaluation.
        configuration: Configuration of the evaluation that the control is compared with.

    Returns:
        One row per row of the data.

    Raises:
        InputError: The directory holds no finished run, or a run of another benchmark, split, template, precision or
            other setting, which the message names.
    """
    record = read_finished(path, configuration["command"])
    theirs = record["configuration"]
    for key, ours in configuration.items():
        if key not in ("model_sha256", "device") and theirs.get(key) != ours:
            raise InputError(
                f"{path}: the control's results must have the same {key.removesuffix('_sha256')}, got "
                f"{_short(theirs.get(key))} instead of {_short(ours)}. Evaluate the control with the same options, or "
                "give the model itself as `control`."
            )
    return read_frame(path / "results.parquet")


def _rows(
    benchmark: Benchmark, subject: Subject, out: str | Path | None, *, batch_size: int, progress: bool
) -> tuple[Rows, Run | None]:
    """Return the rows of an evaluation and its open run directory; None without one."""
    configuration = _configuration(benchmark, subject)
    run = None if out is None else open_run(out, configuration, {"model": subject.name, **benchmark.provenance})
    if run is not None and run.is_complete:
        return read_frame(run.path / "results.parquet"), run
    with computing(run) as clock:
        rows = _score(benchmark.parts, run, batch_size=batch_size, label=subject.name, progress=progress)
    if run is not None:
        run.finish(rows, {}, wall_time_s=clock.seconds, measured={"peak_memory_bytes": peak_memory_bytes()})
    return rows, run


def _score(parts: Sequence[Part], run: Run | None, *, batch_size: int, label: str, progress: bool) -> Rows:
    """Return all rows, in the order of sets and rows; rows that the run holds already are not scored again."""
    frames = [frame for _, frame in run.parts()] if run is not None else []
    done = {key for frame in frames for key in zip(frame["set"], frame["row"], strict=True)}
    pending = {
        part.name: [place for place in range(len(part.costs)) if (part.name, place) not in done] for part in parts
    }
    with Progress(sum(map(len, pending.values())), label, show=progress) as bar:
        for number, part in enumerate(parts):
            order = sorted(pending[part.name], key=lambda place: part.costs[place])
            size = part.at_once or batch_size
            for first in range(0, len(order), size):
                places = order[first : first + size]
                scored = part.score(places)
                found = [{"set": part.name, "row": place, **row} for place, row in zip(places, scored, strict=True)]
                frames.append(pd.DataFrame(found))
                if run is not None:
                    run.keep_part(f"{number:02d}-{min(places):06d}", frames[-1])
                bar.advance(len(places))
    rows: list[Row] = [
        {str(key): value for key, value in row.items()} for frame in frames for row in frame.to_dict("records")
    ]
    position = {part.name: number for number, part in enumerate(parts)}
    # As records, since columns that one set lacks would otherwise turn into others of another type.
    rows.sort(key=lambda row: (position[row["set"]], row["row"]))
    return pd.DataFrame(rows)


def _configuration(benchmark: Benchmark, subject: Subject) -> dict[str, Any]:
    return {
        "command": f"unlearn eval {benchmark.name}",
        **subject.identity,
        "sets": {part.name: len(part.costs) for part in benchmark.parts},
        **benchmark.configuration,
    }


def _digest(configuration: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:32]


def _record(metric: Metric, control: Metric | None) -> dict[str, Any]:
    estimate = metric.estimate
    assert estimate is not None
    interval = estimate.interval if metric.has_interval else None
    low, high = interval or (None, None)
    record: dict[str, Any] = {
        "value": estimate.value,
        "low": low,
        "high": high,
        "n": estimate.n,
        "direction": metric.direction,
        "meaning": metric.meaning,
    }
    reason = metric.reason
    if reason is None and interval is None:
        reason = "too few rows for an interval" if metric.has_interval else "an interval would mean nothing here"
    if reason is not None:
        record["reason"] = reason
    if control is not None and control.estimate is not None:
        difference = combine(np.subtract, estimate, control.estimate)
        ends = difference.interval if metric.has_interval else None
        low, high = ends or (None, None)
        record |= {"control": control.estimate.value, "difference": difference.value}
        record |= {"difference_low": low, "difference_high": high}
    return record


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
