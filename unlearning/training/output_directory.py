"""A training run on disk: checkpoints during training, then the model, its record and its card.

DIR/unlearning.json        configuration, versions, history; `finished` is false until the model is written
DIR/checkpoints/           checkpoint-STEP to resume from, and `best`, if they were asked for
DIR/model.safetensors ...  a plain Hugging Face checkpoint (or adapter), once the run is finished
DIR/README.md              the model card
DIR/../.NAME.lock          the process that trains, while it does (see `unlearning.common.lock`)
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unlearning.checkpoints.locate import RECORD
from unlearning.common import lock
from unlearning.common.errors import InputError, naming
from unlearning.common.hashing import hash_json
from unlearning.common.places import kind_of
from unlearning.data.question_answer import Example
from unlearning.options import with_present_names

CHECKPOINTS = "checkpoints"
BEST = "best"
"""Directory, beside the checkpoints, of the best weights so far (option `keep_best`)."""
CONTENTS = "contents"
"""Entry of a configuration: content hashes of what options name (see `unlearning.training.named_content`)."""
UNREAD = "not read yet"
"""In place of a content hash that is not known yet, and in no record."""
SEEN = "hashed where it is read"
"""In place of the hash of a directory."""
KEPT_TENSORS = "unlearning_step.safetensors"
"""Tensors that a method keeps from one step to the next, in a checkpoint."""
WHOLE = "unlearning_step.json"
"""The last file that is written into a checkpoint: a checkpoint without it is incomplete."""


def hash_examples(examples: Sequence[Example] | None) -> str | None:
    """Return the SHA-256 of the examples' texts in order; None for no examples."""
    return None if examples is None else hash_json([asdict(example) for example in examples])


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    return {name: version(name) for name in ("dissect-unlearning", "torch", "transformers", "accelerate")}


def read_run(output_dir: Path, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """Read the record of a run with this configuration, finished or not.

    Args:
        output_dir: Directory of the run.
        configuration: Configuration that the run must have; keys may be left out.

    Returns:
        The record; None if the directory is missing or empty.

    Raises:
        InputError: The directory holds other files, or a run whose configuration differs; the message names the first
            difference.
    """
    with naming("output_dir"):
        kind = kind_of(output_dir)
    if kind == "nothing":
        _check_writable(output_dir)
        return None
    if kind != "directory":
        raise InputError(f"`output_dir` must be a directory, got the {kind} {output_dir}. Choose another directory.")
    if not any(output_dir.iterdir()):
        return None
    try:
        if kind_of(output_dir / RECORD) != "file":
            raise KeyError(RECORD)
        record = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        done = with_present_names(record["configuration"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"`output_dir` must be new, empty or a run's directory, got {output_dir}, which holds other files. "
            "Choose another directory."
        ) from None
    difference = _difference(done, configuration)
    if difference:
        raise InputError(
            f"`output_dir` {output_dir} holds a run of another configuration: {difference}. Choose another directory, "
            "or remove that run."
        )
    return record


def _check_writable(output_dir: Path) -> None:
    """Check, before training, that the directory can be made."""
    parent = next(parent for parent in output_dir.absolute().parents if os.path.lexists(parent))
    if (kind := kind_of(parent)) != "directory":
        raise InputError(
            f"`output_dir` must be in a directory, got {output_dir}, and {parent} is a {kind}. "
            "Choose another directory."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"`output_dir` must be in a writable directory, got {output_dir}, and {parent} is not writable. "
            "Choose another directory."
        )


@contextmanager
def claimed(output_dir: Path | None) -> Iterator[None]:
    """Hold the directory of a run, so that no other process trains into it; the main process does it for all.

    The lock file is beside the directory, which appears as a whole at the end.

    Args:
        output_dir: Directory of the run; None for none.

    Yields:
        Nothing.

    Raises:
        InputError: Another process holds it, or nothing can be written there.
    """
    if output_dir is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with naming("output_dir"):
        kind = kind_of(output_dir)
    if kind == "link that leads nowhere":
        raise InputError(f"`output_dir` must be a directory, got the {kind} {output_dir}. Choose another directory.")
    target = output_dir.resolve()  # one lock for a directory and for links to it
    parent = target.parent
    if kind != "nothing" and not os.access(parent, os.W_OK | os.X_OK):
        yield  # a finished run that may only be read
        return
    if kind == "nothing":
        _check_writable(output_dir)
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    with saying_disk_full(output_dir):
        parent.mkdir(parents=True, exist_ok=True)
    file = parent / f".{target.name}.lock"
    try:
        with ExitStack() as held:
            with naming("output_dir"):
                held.enter_context(lock.holding(file, output_dir))
            shutil.rmtree(_partial(target), ignore_errors=True)  # of a process that was killed at its very end
            yield
    finally:
        with suppress(OSError):  # nothing was written, so nothing stays
            for each in missing:
                each.rmdir()


def begin_run(output_dir: Path, configuration: dict[str, Any]) -> None:
    """Write the record of an unfinished run.

    Args:
        output_dir: Directory of the run; made if missing.
        configuration: The run's configuration.

    Raises:
        InputError: The disk is full.
    """
    with saying_disk_full(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RECORD, {"finished": False, "configuration": configuration})


def abandon_run(output_dir: Path) -> None:
    """Remove incomplete checkpoints, and the whole directory if nothing but its record is left."""
    remove_broken_checkpoints(output_dir)
    entries = [path for path in output_dir.rglob("*") if path.is_file()] if output_dir.is_dir() else []
    if [path.name for path in entries] == [RECORD]:
        shutil.rmtree(output_dir)


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint; None if there is none."""
    whole = [path for path in (output_dir / CHECKPOINTS).glob("checkpoint-*") if (path / WHOLE).is_file()]
    return max(whole, key=_step, default=None)


def remove_broken_checkpoints(output_dir: Path) -> None:
    """Remove incomplete checkpoints."""
    for path in (output_dir / CHECKPOINTS).glob("checkpoint-*"):
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)


def tidy_checkpoints(output_dir: Path, keep: int) -> str | None:
    """Remove what a finished run needs no more, and say what stays of its checkpoints.

    The best weights are the finished model. The other checkpoints were asked for (`save_every`): they stay, unless none
    are to be kept. They hold the optimizer's state too, and may take several times the model's size.

    Args:
        output_dir: Directory of a finished run.
        keep: The option `keep_checkpoints`.

    Returns:
        A sentence with number, size and place of the checkpoints that stay; None if none do.
    """
    directory = output_dir / CHECKPOINTS
    shutil.rmtree(directory if keep == 0 else directory / BEST, ignore_errors=True)
    kept = sorted(directory.glob("checkpoint-*")) if directory.is_dir() else []
    if not kept:
        with suppress(OSError):  # there is none, or it holds something else
            directory.rmdir()
        return None
    size = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    count = f"{len(kept)} checkpoint{'s' if len(kept) > 1 else ''}"
    return (
        f"{count} of the finished run, {size / 1e9:.2g} GB, in {directory}: remove that directory if you do not need "
        "them, or set keep_checkpoints=0"
    )


def finish_run(
    output_dir: Path, write_model: Callable[[Path], None], record: dict[str, Any], card: str, *, is_main: bool
) -> None:
    """Write the finished run.

    Everything is written into a directory beside `output_dir` and then moved, the record last, so that an interrupted
    run never looks finished.

    Args:
        output_dir: Directory of the run.
        write_model: Write weights, configuration and tokenizer into a directory; called on every process.
        record: Content of `unlearning.json`.
        card: Content of `README.md`.
        is_main: This process writes the record and the card, and moves the files.

    Raises:
        InputError: The disk is full, or the finished model cannot be moved; the message names where it is then.
    """
    target = output_dir.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with saying_disk_full(output_dir):
            write_model(partial)
            if not is_main:
                return
            (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
            write_json(partial / RECORD, record)
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _move(partial, target)
    except OSError as error:  # the model is whole: hours of training stay
        raise InputError(
            f"{output_dir}: the finished model cannot be moved there: {error.strerror or error}. It is in {partial}: "
            "move that directory elsewhere, since the next run with this `output_dir` removes it."
        ) from None


def _move(partial: Path, target: Path) -> None:
    """Move a finished run to its place, at once if nothing is there, else its record last."""
    if not target.exists() or not any(target.iterdir()):
        try:
            os.replace(partial, target)  # also in place of an empty directory
            return
        except OSError:
            if not target.is_dir():
                raise
            # an empty directory that cannot be replaced, such as one that a volume is mounted on
    with suppress(OSError):
        (target / CHECKPOINTS).rmdir()  # only if it is empty
    for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):
        os.replace(path, target / path.name)
    partial.rmdir()


def _partial(output_dir: Path) -> Path:
    """Return the directory beside a run's in which the finished run is written."""
    return output_dir.parent / f".{output_dir.name}.partial"


@contextmanager
def saying_disk_full(directory: Path) -> Iterator[None]:
    """Raise one kind of error for a full disk, whichever library reports it.

    Args:
        directory: Directory of the run, whose last checkpoint the message names.

    Yields:
        Nothing.

    Raises:
        InputError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        # safetensors raises its own exception with the system's message; torch only names the place in its source.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        words = ("No space left", "inline_container", "iostream error")
        if not full and not any(word in str(error) for word in words):
            raise
        kept = last_checkpoint(directory)
        rest = f"; the last complete checkpoint is {kept}" if kept else ""
        raise InputError(
            f"{directory}: no space left on the disk{rest}. Free some space and run the command again."
        ) from None


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def write_json(path: Path, content: Any) -> None:
    """Write the file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        partial.write_bytes(text.encode(errors="backslashreplace"))  # half characters as JSON writes them, \\udc80
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _difference(done: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return the first difference between a run's configuration and the wanted one, in words; empty if there is none.

    Where the wanted one has the hash of what an option names, the name itself does not count.
    """
    contents, known = wanted.get(CONTENTS, {}), done.get(CONTENTS, {})
    for name, value in wanted.items():
        theirs = done.get(name)
        if name == CONTENTS or theirs == value or (name in _LATER and name not in done):
            continue
        if name in _HASHED:
            return f"its {_HASHED[name]} differ"
        if not isinstance(theirs, dict) or not isinstance(value, dict):
            return f"{name} is {theirs!r} there, {value!r} now"
        for key in value:
            if theirs.get(key) != value[key] and not (contents.get(key) and known.get(key)):
                return f"{key} is {theirs.get(key)!r} there, {value[key]!r} now"
    for key, sha256 in contents.items():
        if sha256 not in (None, SEEN, UNREAD, known.get(key)):
            return f"what {key} names has other content now" if key in known else f"it has no hash of what {key} names"
    return ""


_HASHED = {
    "forget_data": "forget data",
    "retain_data": "retain data",
    "alternates_data": "alternate answers",
    "start_weights": "weights before training",
    "start_configuration": "configurations of the model before training",
    "tokenizer": "tokenizers",
}
"""Entries of a configuration that are content hashes, in words."""

_LATER = ("start_configuration", "tokenizer")
"""Entries that records of earlier versions lack."""
