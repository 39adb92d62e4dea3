"""MMLU, WinoGrande, HellaSwag, ARC, BoolQ, PIQA and others by lm-evaluation-harness, on the model as it is loaded here.

Every metric is the task's own metric, a mean over its rows (TASK_acc, TASK_acc_norm, ...; unit and range are the
task's), and for a group the mean over its tasks. Higher is better unless the task says otherwise; for tasks that begin
with `wmdp` the direction is turned around. `TASK_truncated` is the share of rows longer than the model's context.

Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unlearning.common.errors import InputError, check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.chat import DEFAULT_CHAT_DATE, ChatFormat, chat_format
from unlearning.evaluation.benchmarks.lm_eval.tasks import Group, identity_of, load_task, plan_tasks
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.statistics import Direction, Metric, Resampled, Sample, Values, combine
from unlearning.evaluation.subject import Subject

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from unlearning.evaluation.benchmarks.lm_eval.model import HarnessModel

_AT_ONCE = 1024
"""Rows scored and kept together, if the solved examples shown do not depend on earlier rows."""

_FORGET_TASKS = "wmdp"
"""Prefix of tasks on which a good unlearned model fails."""


@dataclass(frozen=True)
class _Measure:
    """Properties of a task's metric: it is a mean over rows, and higher is better."""

    is_mean: bool
    higher_is_better: bool


@dataclass(frozen=True)
class Tasks:
    """Which tasks are run, and on which data.

    Attributes:
        names: Names of tasks, groups or tags.
        tasks_dir: Directory of additional tasks (.yaml).
        data_dir: Directory of the tasks' data sets, as TASK/SPLIT.jsonl (or .json, .parquet) with the hub's columns,
            or as copies of the hub's data sets; the rest comes from the hub.
        num_fewshot: Number of solved examples shown; None for each task's own.
        limit: Use only the first N rows of each task.
    """

    names: Sequence[str]
    tasks_dir: Path | None = None
    data_dir: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def prepare(subject: Subject, tasks: Tasks, *, chat: bool = False, seed: int = 0, batch_size: int = 16) -> Benchmark:
    """Make tasks of lm-evaluation-harness ready for a model.

    Args:
        subject: The model.
        tasks: The tasks and their data.
        chat: Wrap prompts by the tokenizer's chat template.
        seed: Random seed of the solved examples and of the bootstrap.
        batch_size: Number of requests at a time.

    Returns:
        The benchmark, with one set per task.

    Raises:
        InputError: lm-evaluation-harness is not installed, a task is unknown, its data is neither local nor on the
            hub, or the tokenizer has no chat template.
    """
    if tasks.limit is not None:
        check_at_least("limit", tasks.limit, 1)
    form = chat_format(subject.tokenizer, instead="leave `chat` out") if chat else None
    with _quiet():
        plan = plan_tasks(tasks.names, tasks.tasks_dir)
        loaded = {
            name: load_task(plan, name, tasks.data_dir, num_fewshot=tasks.num_fewshot, seed=seed) for name in plan.tasks
        }
        docs = {name: [dict(doc) for doc in task.eval_docs][: tasks.limit] for name, task in loaded.items()}
        model = _wrap(subject, batch_size, form)
    measures = {name: _measures(task) for name, task in loaded.items()}
    return Benchmark(
        name="lm-eval",
        configuration={
            "lm_eval": version("lm_eval"),
            "tasks": {name: identity_of(task, docs[name]) for name, task in loaded.items()},
            "chat": hash_json([subject.tokenizer.chat_template, DEFAULT_CHAT_DATE]) if chat else None,
            "fewshot_seed": seed if any(task.get_config("num_fewshot") for task in loaded.values()) else None,
        },
        parts=[_part(name, task, docs[name], model, chat=chat) for name, task in loaded.items()],
        summarise=lambda rows, _control: summarise(rows, measures=measures, groups=plan.groups, seed=seed),
        notes=_notes(loaded, model),
    )


def check_tasks(tasks: Sequence[str], tasks_dir: Path | None) -> None:
    """Check names before a model is loaded.

    Args:
        tasks: Names of tasks, groups or tags.
        tasks_dir: Directory of additional tasks.

    Raises:
        InputError: A task is unknown, or the directory does not exist.
    """
    with _quiet():
        plan_tasks(tasks, tasks_dir)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-evaluation-harness' messages and progress bars off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _wrap(subject: Subject, batch_size: int, chat: ChatFormat | None = None) -> "HarnessModel":
    from unlearning.evaluation.benchmarks.lm_eval.model import HarnessModel

    return HarnessModel(subject, batch_size, chat)


def _notes(tasks: Mapping[str, "Task"], model: "HarnessModel") -> tuple[str, ...]:
    shots = tuple(f"{name}: {task.get_config('num_fewshot')}-shot" for name, task in tasks.items())
    described = any(task.get_config("description") for task in tasks.values())
    if model.chat is None or model.takes_system or not described:
        return shots
    return (*shots, "the chat template has no system turns: the tasks' descriptions are left out")


def _measures(task: "Task") -> dict[str, _Measure]:
    from lm_eval.api.metrics import mean

    higher = task.higher_is_better()
    return {
        name: _Measure(function is mean, bool(higher.get(name, True))) for name, function in task.aggregation().items()
    }


def _part(name: str, task: "Task", docs: Sequence[Mapping[str, Any]], model: "HarnessModel", *, chat: bool) -> Part:
    def score(places: Sequence[int]) -> list[Row]:
        from lm_eval.evaluator import evaluate

        chosen = sorted(places)
        try:
            with _quiet():
                found = evaluate(
                    model,
                    {"tasks": {name: task}},
                    samples={name: chosen},
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                )
        except InputError:  # of the chat template
            raise
        except Exception as error:  # of the task's own code, on these rows
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
            raise InputError(
                f"{name}: lm-evaluation-harness stopped at one of the rows {chosen[0]} to {chosen[-1]} "
                f"({type(error).__name__}: {reason})"
            ) from error
        rows: dict[int, Row] = {}
        for sample in found["samples"][name]:
            place = int(sample["doc_id"])
            row = rows.setdefault(place, _described(sample, docs[place], model))
            row |= _values(sample)
        return [rows[place] for place in places]

    own_draws = bool(task.get_config("num_fewshot"))
    return Part(name, [1] * len(docs), score, at_once=len(docs) if own_draws else _AT_ONCE)


def _described(sample: Mapping[str, Any], doc: Mapping[str, Any], model: "HarnessModel") -> Row:
    """Return the target of a row, and the model's log-likelihoods or its generated text."""
    row: Row = {"id": str(doc.get("id", "")), "group": "", "target": str(sample["target"])}
    answers = [responses[0] for responses in sample["resps"]]
    if all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        row["log_likelihoods"] = [float(answer[0]) for answer in answers]
        row["truncated"] = any(_is_cut(model, "".join(request)) for request in sample["arguments"])
    elif all(isinstance(answer, str) for answer in answers):
        row["generated"] = answers[0]
    return row


def _is_cut(model: "HarnessModel", text: str) -> bool:
    """Return whether a text is longer than the model's context; its beginning is then cut off silently."""
    if len(text.encode()) <= model.max_length:  # a token is a byte at least
        return False
    return len(model.tok_encode(text)) > model.max_length + 1


def _values(sample: Mapping[str, Any]) -> dict[str, float]:
    """Return a row's numeric metrics; the name of a filter follows the metric's name after `@`."""
    suffix = "" if sample["filter"] == "none" else f"@{sample['filter']}"
    values = {name: sample[name] for name in sample["metrics"]}
    return {
        f"{name}{suffix}": float(value)
        for name, value in values.items()
        if isinstance(value, bool | int | float | np.number)
    }


def summarise(
    rows: Rows, *, measures: Mapping[str, Mapping[str, _Measure]], groups: Sequence[Group], seed: int
) -> list[Metric]:
    """Compute the mean of every metric of every task, then those of groups.

    Args:
        rows: Rows of every task.
        measures: Properties of every task's metrics.
        groups: Groups of tasks.
        seed: Random seed of the bootstrap.

    Returns:
        The metrics, tasks first.
    """
    metrics: list[Metric] = []
    means: dict[str, dict[str, Resampled]] = {}
    for task, known in measures.items():
        frame = rows[rows["set"] == task]
        sample = Sample(task, [""] * len(frame), seed=seed)
        means[task] = {}
        for name, measure in known.items():
            columns = [column for column in frame if str(column).partition("@")[0] == name]
            if not measure.is_mean:
                reason = "it is no mean over rows, so it has no bootstrap interval; lm_eval itself computes it"
                metrics.append(Metric(f"{task}_{name}", None, _direction(task, measure), "", reason=reason))
                continue
            for column in columns:
                estimate = sample.mean(np.asarray(frame[column], dtype=np.float64))
                if estimate is not None:
                    means[task][str(column)] = estimate
                    meaning = f"{name} of lm-evaluation-harness' task {task}, mean over its rows"
                    metrics.append(Metric(f"{task}_{column}", estimate, _direction(task, measure), meaning))
        metrics += _truncated(task, frame, sample)
    return metrics + [metric for group in groups for metric in _group_metrics(group, means, measures)]


def _group_metrics(
    group: Group,
    means: Mapping[str, Mapping[str, Resampled]],
    measures: Mapping[str, Mapping[str, _Measure]],
) -> list[Metric]:
    metrics = []
    for name, by_size in group.metrics:
        columns = {column for task in group.tasks for column in means[task] if column.partition("@")[0] == name}
        for column in sorted(columns):
            tasks = [task for task in group.tasks if column in means[task]]
            parts = [means[task][column] for task in tasks]
            sizes = np.array([part.n if by_size else 1 for part in parts])

            def averaged(*values: Values, sizes: np.ndarray = sizes) -> Values:
                return np.asarray(np.average(values, axis=0, weights=sizes))

            estimate = replace(combine(averaged, *parts), n=sum(part.n for part in parts))
            weighed = "weighted by their numbers of rows" if by_size else "all with the same weight"
            meaning = f"{name} over the {len(tasks)} tasks of {group.name}, {weighed}"
            direction = _direction(group.name, measures[tasks[0]][name])
            metrics.append(Metric(f"{group.name}_{column}", estimate, direction, meaning))
    return metrics


def _truncated(task: str, frame: Rows, sample: Sample) -> list[Metric]:
    if "truncated" not in frame or not frame["truncated"].eq(True).any():
        return []
    return [
        Metric(
            f"{task}_truncated",
            sample.mean(np.asarray(frame["truncated"], dtype=np.float64)),
            "descriptive, no direction",
            "share of rows longer than the model's context; lm-evaluation-harness cuts off their beginning",
        )
    ]


def _direction(task: str, measure: _Measure) -> Direction:
    higher = measure.higher_is_better != task.startswith(_FORGET_TASKS)
    return "higher is better" if higher else "lower is better"
