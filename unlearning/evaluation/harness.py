"""A benchmark: sets of rows that are scored, kept as they are finished, and summed up, alone or against a retain model.

OUT/run.json           what the numbers depend on, versions, hashes, wall time
OUT/parts/*.parquet    finished rows of an evaluation that is not complete
OUT/results.parquet    one row per row of the data: `set`, `row`, `id`, `group`, and what was measured
OUT/retain.parquet     the same of the retain model, where there is one
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
from unlearning.common.errors import InputError
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
        name: of the set, which becomes the column `set`.
        costs: of each row, as its number of tokens: rows of similar cost are scored together.
        score: scores the rows at these places and gives what was measured, in the places' order. A row may hold
            numbers, texts, truth values, None and lists of numbers; `id` and `group` say what it is.
        at_once: rows that `score` is given at a time and that are kept together; None for the batch size.
    """

    name: str
    costs: Sequence[int]
    score: Callable[[Sequence[int]], list[Row]]
    at_once: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is ready to run on one model.

    Attributes:
        name: as `unlearn eval` calls it.
        configuration: everything that the rows depend on beside the model: hashes of the data, wrapping, lengths.
            Plain data. A retain model's results count only where theirs is the same.
        parts: what is scored.
        summarise: from the rows, and the retain model's where there are some, to the metrics. Called with the retain
            model's rows alone, too.
        provenance: what else is worth keeping, as file names.
        notes: what a reader should know, one line each.
    """

    name: str
    configuration: dict[str, Any]
    parts: Sequence[Part]
    summarise: Callable[[Rows, Rows | None], list[Metric]]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a benchmark found.

    Attributes:
        benchmark: its name.
        model: the name of the evaluated model.
        rows: one per row of the data.
        metrics: of the model.
        retain_rows, retain_metrics: of the retain model; None where there is none.
        retain: the retain model's name, or the directory of its results.
        notes: one line each.
    """

    benchmark: str
    model: str
    rows: Rows
    metrics: list[Metric]
    retain_rows: Rows | None = None
    retain_metrics: list[Metric] | None = None
    retain: str | None = None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float | None:
        """The value of a metric; None where it could not be computed."""
        for metric in self.metrics:
            if metric.name == name:
                return None if metric.estimate is None else metric.estimate.value
        raise KeyError(name)

    def summary(self) -> dict[str, Any]:
        """What a paper quotes, as plain data; a number that is not there is null, with its reason."""
        others = {metric.name: metric for metric in self.retain_metrics or []}
        metrics = {metric.name: _record(metric, others.get(metric.name)) for metric in self.metrics if metric.estimate}
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "retain_model": self.retain,
            "rows": dict(Counter(map(str, self.rows["set"]))),
            "metrics": metrics,
            "left_out": {metric.name: metric.reason for metric in self.metrics if metric.estimate is None},
            "notes": list(self.notes),
        }


def evaluate(
    prepare: Callable[[Subject], Benchmark],
    subject: Subject,
    *,
    retain: Subject | str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Run a benchmark on a model, going on where a run that was stopped left off.

    Args:
        prepare: makes the benchmark ready for a model (which gives the tokenizer); called for each model.
        subject: the model.
        retain: a model trained without the forget set, which is evaluated too (once: results are kept in the cache
            under hashes of model, data and configuration), or the run directory of its finished evaluation.
        out: run directory; without it nothing is written.
        batch_size: rows at a time; no number depends on it.
        progress: a progress bar on stderr.

    Raises:
        InputError: what the benchmark refuses; `out` holds another run; retain results of another configuration (in
            what they differ).
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: 1 or more")
    benchmark = prepare(subject)
    rows, run = _rows(benchmark, subject, out, batch_size=batch_size, progress=progress)
    retain_rows: Rows | None = None
    if retain is not None:
        results = (
            remembered(prepare, retain, batch_size=batch_size, progress=progress)
            if isinstance(retain, Subject)
            else Path(retain)
        )
        retain_rows = read_retain_rows(results, _configuration(benchmark, subject))
    evaluation = Evaluation(
        benchmark=benchmark.name,
        model=subject.name,
        rows=rows,
        metrics=benchmark.summarise(rows, retain_rows),
        retain_rows=retain_rows,
        retain_metrics=None if retain_rows is None else benchmark.summarise(retain_rows, None),
        retain=None if retain is None else retain.name if isinstance(retain, Subject) else str(retain),
        notes=benchmark.notes,
    )
    if run is not None:
        if retain_rows is not None:
            write_frame(run.path / "retain.parquet", retain_rows)
        write_json(run.path / "summary.json", evaluation.summary())
    return evaluation


def remembered(
    prepare: Callable[[Subject], Benchmark], subject: Subject, *, batch_size: int = 16, progress: bool = True
) -> Path:
    """The run directory of a model's evaluation in the cache, where it is evaluated unless it has been before.

    The directory is named by a hash of the model's content and of all that the numbers depend on.
    """
    benchmark = prepare(subject)
    path = cache_directory("evaluation") / _digest(_configuration(benchmark, subject))
    _rows(benchmark, subject, path, batch_size=batch_size, progress=progress)
    return path


def read_retain_rows(path: Path, configuration: dict[str, Any]) -> Rows:
    """The rows of a retain model's finished evaluation.

    Args:
        path: its run directory.
        configuration: of the evaluation that it is compared with.

    Raises:
        InputError: no such run, not finished, or of another benchmark, split, template, precision, ... (which).
    """
    record = read_finished(path, configuration["command"])
    theirs = record["configuration"]
    for key, ours in configuration.items():
        if key not in ("model_sha256", "device") and theirs.get(key) != ours:
            what = f"{_short(theirs.get(key))} there, {_short(ours)} here"
            raise InputError(
                f"{path}: a retain result of another {key.removesuffix('_sha256')} ({what}); evaluate the "
                "retain model with the same options, or give it as --retain-model"
            )
    return read_frame(path / "results.parquet")


def _rows(
    benchmark: Benchmark, subject: Subject, out: str | Path | None, *, batch_size: int, progress: bool
) -> tuple[Rows, Run | None]:
    provenance = {"model": subject.name, **benchmark.provenance}
    run = None if out is None else open_run(out, _configuration(benchmark, subject), provenance)
    if run is not None and run.is_complete:
        return read_frame(run.path / "results.parquet"), run
    with computing(run) as clock:
        rows = _score(benchmark.parts, run, batch_size=batch_size, label=subject.name, progress=progress)
    if run is not None:
        run.finish(rows, {}, wall_time_s=clock.seconds, measured={"peak_memory_bytes": peak_memory_bytes()})
    return rows, run


def _score(parts: Sequence[Part], run: Run | None, *, batch_size: int, label: str, progress: bool) -> Rows:
    """All rows, sets in order and rows in order; what the run holds already is not scored again."""
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


def _record(metric: Metric, retain: Metric | None) -> dict[str, Any]:
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
    if retain is not None and retain.estimate is not None:
        difference = combine(np.subtract, estimate, retain.estimate)
        ends = difference.interval if metric.has_interval else None
        low, high = ends or (None, None)
        record |= {"retain_model": retain.estimate.value, "difference": difference.value}
        record |= {"difference_low": low, "difference_high": high}
    return record


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
