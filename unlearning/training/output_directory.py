"""A training run on disk: checkpoints while it goes on, then the model, `unlearning.json` and its card.

DIR/unlearning.json        configuration, versions, history; `finished` is false while checkpoints are all there is
DIR/checkpoints/           checkpoint-STEP to resume from, and `best`, where they were asked for
DIR/model.safetensors ...  a plain Hugging Face checkpoint (or adapter), once the run is finished
DIR/README.md              its model card
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unlearning.checkpoints.locate import RECORD
from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.data.question_answer import Example

CHECKPOINTS = "checkpoints"
WHOLE = "unlearning_step.json"
"""The last file that is written into a checkpoint: one without it was cut short."""


def hash_examples(examples: Sequence[Example] | None) -> str | None:
    """SHA-256 of the examples' texts in their order; None where there are none."""
    return None if examples is None else hash_json([asdict(example) for example in examples])


def library_versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    return {name: version(name) for name in ("dissect-unlearning", "torch", "transformers", "accelerate")}


def read_run(output_dir: Path, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run of this very configuration in `output_dir`, finished or not; None where it is free.

    Raises:
        InputError: the directory holds something else; names the first thing that differs.
    """
    if not output_dir.exists():
        _check_place(output_dir)
        return None
    if not output_dir.is_dir():
        raise InputError(f"{output_dir}: a file is in the way; choose another output directory")
    if not any(output_dir.iterdir()):
        return None
    try:
        record = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        done = record["configuration"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{output_dir}: holds other files; choose another output directory or empty it") from None
    for name, value in configuration.items():
        if done.get(name) != value:
            raise InputError(
                f"{output_dir}: holds a model of another configuration ({_difference(name, done.get(name), value)}); "
                "choose another output directory or remove it"
            )
    return record


def _check_place(output_dir: Path) -> None:
    """Refuse a directory that could not be made, before anything is trained for it."""
    place = next(parent for parent in output_dir.absolute().parents if parent.exists())
    if not place.is_dir():
        raise InputError(f"{output_dir}: {place} is a file; choose another output directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{output_dir}: {place} cannot be written; choose another output directory")


def begin_run(output_dir: Path, configuration: dict[str, Any]) -> None:
    """Take the directory for a run that keeps checkpoints.

    Raises:
        InputError: the disk is full.
    """
    with saying_disk_full(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(output_dir / RECORD, {"finished": False, "configuration": configuration})


def abandon_run(output_dir: Path) -> None:
    """Remove an unfinished run that kept nothing, and of others what was cut short."""
    remove_broken_checkpoints(output_dir)
    entries = [path for path in output_dir.rglob("*") if path.is_file()] if output_dir.is_dir() else []
    if [path.name for path in entries] == [RECORD]:
        shutil.rmtree(output_dir)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    whole = [path for path in (output_dir / CHECKPOINTS).glob("checkpoint-*") if (path / WHOLE).is_file()]
    return max(whole, key=_step, default=None)


def remove_broken_checkpoints(output_dir: Path) -> None:
    """Remove checkpoints whose writing was cut short."""
    for path in (output_dir / CHECKPOINTS).glob("checkpoint-*"):
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)


def finish_run(
    output_dir: Path, write_model: Callable[[Path], None], record: dict[str, Any], card: str, *, is_main: bool
) -> None:
    """Write everything beside `output_dir`, then move it there, the record last: an interrupted end leaves no model.

    Args:
        output_dir: of the run.
        write_model: writes weights, configuration and tokenizer into a directory; called on every process.
        record: `unlearning.json`.
        card: `README.md`.
        is_main: whether this process moves what was written.

    Raises:
        InputError: the disk is full.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = output_dir.parent / f".{output_dir.name}.partial"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with saying_disk_full(output_dir):
            write_model(partial)
            if not is_main:
                return
            (partial / "README.md").write_text(card, encoding="utf-8")
            _write_json(partial / RECORD, record)
            if not output_dir.exists():
                os.replace(partial, output_dir)
                return
            with suppress(OSError):
                (output_dir / CHECKPOINTS).rmdir()  # where it is empty
            for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):
                os.replace(path, output_dir / path.name)
            partial.rmdir()
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def saying_disk_full(directory: Path) -> Iterator[None]:
    """Turn the many ways of saying that a disk is full into one line.

    Raises:
        InputError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        # safetensors has an exception of its own for it, with the system's words in it; torch says where it noticed.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        words = ("No space left", "inline_container", "iostream error")
        if not full and not any(word in str(error) for word in words):
            raise
        kept = last_checkpoint(directory)
        rest = f"; the last whole checkpoint is {kept}" if kept else ""
        raise InputError(f"{directory}: no space left on the disk; free some and run it again{rest}") from None


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _difference(name: str, done: Any, wanted: Any) -> str:
    if isinstance(done, dict) and isinstance(wanted, dict):
        for key in wanted:
            if done.get(key) != wanted[key]:
                return f"{key}: {done.get(key)!r} there, {wanted[key]!r} now"
    if isinstance(wanted, str) and len(wanted) == 64:
        return f"another {name.replace('_', ' ')}"
    return f"{name}: {done!r} there, {wanted!r} now"
