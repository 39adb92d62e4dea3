"""Tasks of lm-evaluation-harness by name, with their data from the hub or from a local directory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError, nearest
from unlearning.common.hashing import hash_json
from unlearning.data.records import Record, read_records

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_FOLDERS = ("arc", "hellaswag", "mmlu/default", "openbookqa", "piqa", "super_glue/boolq", "winogrande")
"""Folders of the usual tasks in lm-evaluation-harness: reading all fifteen thousand tasks takes ten seconds."""

_SUFFIXES = (".parquet", ".jsonl", ".json")  # a CSV's cells are all texts, and tasks count on numbers and lists


@dataclass(frozen=True)
class Group:
    """Tasks that are averaged together.

    Attributes:
        name: Name of the group.
        tasks: Names of all its tasks.
        metrics: Names of the averaged metrics, each with whether tasks are weighted by their number of rows.
    """

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Plan:
    """Tasks to be run.

    Attributes:
        manager: Index of the known tasks.
        tasks: Changes to each task's own configuration, by the task's name, in the order that was asked for.
        groups: Groups and their sub-groups.
    """

    manager: "TaskManager"
    tasks: dict[str, dict[str, Any]]
    groups: list[Group]


def check_installed() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        InputError: lm-evaluation-harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "lm-evaluation-harness is not installed. Install it by `pip install 'dissect-unlearning[eval]'`."
        )


def plan_tasks(names: Sequence[str], tasks_dir: Path | None = None) -> Plan:
    """Find tasks, groups and tags, and resolve groups into their tasks.

    Args:
        names: Names in lm-evaluation-harness.
        tasks_dir: Directory of additional tasks (.yaml), which replace built-in tasks of the same name.

    Returns:
        The tasks and groups.

    Raises:
        InputError: lm-evaluation-harness is not installed, the directory does not exist, a name is unknown, or a
            group defines tasks inside itself.
    """
    check_installed()
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise InputError(f"`tasks_dir` must be a directory, got {tasks_dir} (no such directory)")
    if not names:
        raise InputError("`tasks` must name at least one task, such as mmlu,winogrande,hellaswag, got none")
    manager = _manager(tasks_dir, everything=False)
    if any(name not in manager.task_index for name in names):
        manager = _manager(tasks_dir, everything=True)
    plan = Plan(manager, {}, [])
    for name in names:
        if name not in manager.task_index:
            hint = nearest(name, manager.all_tasks) or ";"
            raise InputError(
                f"`tasks`: lm-evaluation-harness has no task {name!r}{hint} `tasks_dir` adds your own tasks"
            )
        _expand(name, {}, plan)
    return plan


def _manager(tasks_dir: Path | None, *, everything: bool) -> "TaskManager":
    own = [] if tasks_dir is None else sorted(tasks_dir.glob("**/*.yaml"))
    return _indexed(tasks_dir, tuple((file, file.stat().st_mtime_ns) for file in own), everything)


@cache
def _indexed(tasks_dir: Path | None, _own: tuple[tuple[Path, int], ...], everything: bool) -> "TaskManager":
    """Return the index of known tasks; it is built again after a change of the user's own tasks."""
    import lm_eval.tasks

    built_in = Path(lm_eval.tasks.__file__).parent
    folders = [] if everything else [folder for name in _FOLDERS if (folder := built_in / name).is_dir()]
    own = [] if tasks_dir is None else [tasks_dir]
    return lm_eval.tasks.TaskManager(include_path=[*folders, *own], include_defaults=everything)


def _expand(name: str, changes: Mapping[str, Any], plan: Plan) -> list[str]:
    """Add a task, or all tasks of a group or a tag, to the plan and return their names."""
    from lm_eval.config.group import GroupConfig

    entry = plan.manager.task_index[name]
    if entry.kind.name == "TAG":
        return [task for member in sorted(entry.tags) for task in _expand(member, changes, plan)]
    if entry.kind.name != "GROUP":
        if plan.tasks.setdefault(name, dict(changes)) != changes:
            raise InputError(f"{name}: two groups ask for this task in two ways. Evaluate them in two runs.")
        return [name]
    content = entry.cfg or {}
    own = {field.name for field in fields(GroupConfig)}
    changes = {key: value for key, value in content.items() if key not in own} | dict(changes)
    tasks: list[str] = []
    for member in content.get("task") or ():
        member = {"task": member} if isinstance(member, str) else dict(member)
        inner = member.pop("group", None) or member.pop("task", None)
        if inner not in plan.manager.task_index:
            raise InputError(
                f"{name}: the group defines {inner!r} inside itself, which is not supported. Name its tasks one by one."
            )
        tasks += _expand(inner, {**changes, **member}, plan)
    summed = content.get("aggregate_metric_list") or ()
    metrics = tuple((one["metric"], bool(one.get("weight_by_size", True))) for one in summed)
    if metrics and all(group.name != name for group in plan.groups):
        plan.groups.append(Group(name, tuple(dict.fromkeys(tasks)), metrics))
    return tasks


def load_task(plan: Plan, name: str, data_dir: Path | None, *, num_fewshot: int | None, seed: int) -> "Task":
    """Load a task with its data.

    Args:
        plan: Plan that holds the task.
        name: Name of the task.
        data_dir: Directory whose files are used if it has them for this task.
        num_fewshot: Number of solved examples shown; None for the task's own. A task that asks for none stays without,
            as in lm-evaluation-harness.
        seed: Random seed of the solved examples.

    Returns:
        The task, with its data in memory.

    Raises:
        InputError: The data is neither local nor on the hub, or lacks what the task needs.
    """
    entry = plan.manager.task_index[name]
    changes = dict(plan.tasks[name])
    content = {**(entry.cfg or {}), **changes}
    directory = None if data_dir is None or entry.kind.name != "TASK" else _directory(name, content, data_dir)
    if directory is not None:
        changes |= _local(name, content, directory)
    try:
        # A group around it, because only a group's members are looked up and changed.
        task = plan.manager.load([{"group": "unlearn", "task": [{"task": name, **changes}]}])["tasks"][name]
    except InputError:
        raise
    except Exception as error:  # whatever the hub, a data set's reader, or a task's own code raises
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        source = content.get("dataset_path")
        remedy = (
            f"the files in {directory} need the columns of {source}"
            if directory is not None
            else f"put the files of {source} into {(data_dir or Path('DIR')) / name}/ and give `data_dir`"
        )
        raise InputError(f"{name}: its data cannot be used ({what}); {remedy}") from error
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)
    return task


def identity_of(task: "Task", docs: Sequence[Any]) -> dict[str, Any]:
    """Return what a task's rows depend on: its configuration and hashes of its data.

    Args:
        task: The task.
        docs: Its evaluated rows.

    Returns:
        Version, number of solved examples, and hashes of configuration and data.
    """
    content = task.dump_config()
    settings = {key: value for key, value in content.items() if key not in ("metadata", "custom_dataset")}
    shown = list(task.sampler.df) if task.get_config("num_fewshot") and hasattr(task, "sampler") else []
    return {
        "version": str(task.VERSION),
        "num_fewshot": task.get_config("num_fewshot"),
        "config_sha256": hash_json(json.dumps(settings, default=str, sort_keys=True)),
        "data_sha256": hash_json(json.dumps([list(docs), shown], default=str)),
    }


def _directory(name: str, content: Mapping[str, Any], data_dir: Path) -> Path | None:
    """Return the directory of a task's files: one of its name, or a copy of its data set on the hub; else None."""
    repository = data_dir / str(content.get("dataset_path") or "").split("/")[-1]
    config = content.get("dataset_name")
    candidates = [data_dir / name, repository / str(config) if config else repository]
    wanted = _evaluated(content)
    return next((path for path in candidates if path.is_dir() and wanted and _files(path, wanted)), None)


def _evaluated(content: Mapping[str, Any]) -> str | None:
    return content.get("test_split") or content.get("validation_split")


def _files(directory: Path, split: str) -> list[Path]:
    for stem in (split, f"{split}-*", f"data/{split}-*"):
        for suffix in _SUFFIXES:
            if files := sorted(directory.glob(stem + suffix)):
                return files
    return []


def _local(name: str, content: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return the changes that make a task read a directory; splits without files are not asked for."""
    import datasets

    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    records: dict[str, list[Record]] = {}
    changes: dict[str, Any] = {}
    for key in keys:
        split = content.get(key)
        if split and split not in records:
            records[split] = [record for file in _files(directory, split) for record in read_records(file)]
        if split and not records[split]:
            changes[key] = None
    try:
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in records.items() if rows}
    except (ValueError, TypeError) as error:  # pyarrow's errors among them
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: all rows in {directory} must have the same columns ({reason})") from None

    def read_local(**_metadata: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(splits)

    return {**changes, "custom_dataset": read_local}
