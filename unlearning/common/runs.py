"""A run on disk: its configuration and tidy tables, and how it is resumed.

    DIR/run.json          configuration, versions, hashes, wall time, peak memory
    DIR/parts/*.parquet   finished batches of a run that is not complete
    DIR/results.parquet   tidy: one row per example and intervention
    DIR/summary.json      the numbers a paper quotes
    DIR/figures/
    DIR/.lock             the process that writes the run, while it does (see `unlearning.common.lock`)

Every file is written under another name and then moved, so that a run that is killed leaves whole files only.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import resource
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from unlearning.common import lock
from unlearning.common.errors import InputError, naming
from unlearning.common.hashing import hash_json
from unlearning.common.places import kind_of
from unlearning.common.terminal import plain

FORMAT = 1
STATUSES = ("running", "complete")
_ENTRIES: tuple[tuple[str, Any, str], ...] = (
    ("format", int, "a whole number"),
    ("status", str, "a text"),
    ("configuration", dict, "an object"),
    ("wall_time_s", int | float, "a number of seconds"),
)
"""Entries that every `run.json` has, with their types."""
LOCK = ".lock"
_NAME = b"dissect.name"
"""Key, in a finished batch's file, of the batch's name, which the name of the file may not hold."""
_OF = b"dissect.configuration"
"""Key, in a finished batch's file, of the hash of the configuration that it belongs to."""
_VERSIONS = ("dissect-unlearning", "torch", "transformers", "transformer-lens")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and move that file to `path` when it is complete.

    Args:
        path: The file; missing directories are created.
        write: A function that writes the temporary file, given its path.

    Raises:
        InputError: The disk is full, or the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path}: the disk is full; free some space and rerun the same command to resume"
            ) from None
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # an impossible path cannot be unlinked either
            part.unlink()


def file_name(name: str) -> str:
    """Return a name as that of a file: what models and data are called never leads out of a directory.

    Args:
        name: The name; of letters, digits and ``_.,+=-`` it stays as it is.

    Returns:
        The name with every other sign replaced, and a hash where that or its length changed it.

    Examples:
        >>> file_name("main-00001"), file_name("../../etc/passwd")
        ('main-00001', '_._.._etc_passwd-df406b03')
    """
    kept = re.sub(r"^\.|[^\w.,+=-]", "_", name)[:150] or "_"
    return kept if kept == name else f"{kept}-{zlib.crc32(name.encode(errors='replace')):08x}"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole."""
    write_whole(path, lambda part: part.write_bytes(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as a whole; NaN becomes null."""
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet, as a whole."""
    write_whole(path, lambda part: frame.to_parquet(part, index=False))


@dataclass(eq=False)
class Run:
    """An open run directory.

    Attributes:
        path: The directory.
        record: The content of `run.json`.
    """

    path: Path
    record: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """True if the run holds everything that its configuration asks for."""
        return self.record["status"] == "complete"

    @property
    def n_parts(self) -> int:
        """Number of finished batches on disk."""
        return len(_part_files(self.path))

    def parts(self) -> list[tuple[str, pd.DataFrame]]:
        """Return the finished batches, by name; a broken file is removed with a warning, and its batch is missing."""
        whole = []
        for file in _part_files(self.path):
            try:
                name = (pq.read_schema(file).metadata or {}).get(_NAME, file.stem.encode())
                whole.append((name.decode(), pd.read_parquet(file)))
            except (OSError, ValueError) as error:
                if isinstance(error, PermissionError):
                    raise InputError(f"{file}: reading is not permitted; ask for permission") from None
                warnings.warn(f"{file}: broken or cut short; its batch is computed again", stacklevel=2)
                file.unlink(missing_ok=True)
        return whole

    def keep_part(self, name: str, frame: pd.DataFrame) -> None:
        """Write a finished batch, so that a run that is killed need not recompute it.

        Args:
            name: Name of the batch, unique in the run.
            frame: Its rows.
        """
        table = pa.Table.from_pandas(frame, preserve_index=False)
        known = {_OF: self._configuration_hash, _NAME: name.encode()}
        table = table.replace_schema_metadata({**table.schema.metadata, **known})
        write_whole(self.path / "parts" / f"{file_name(name)}.parquet", lambda part: pq.write_table(table, part))

    @property
    def _configuration_hash(self) -> bytes:
        return _digest(self.record["configuration"])

    def note(self, **what: Any) -> None:
        """Add entries to `run.json` that no number depends on."""
        self.record |= what
        write_json(self.path / "run.json", self.record)

    def finish(
        self, frame: pd.DataFrame, summary: dict[str, Any], *, wall_time_s: float, measured: dict[str, Any]
    ) -> None:
        """Write the results, mark the run complete and delete the parts.

        Args:
            frame: The rows of `results.parquet`.
            summary: The content of `summary.json`.
            wall_time_s: Seconds spent since the run was opened; added to those of earlier sessions.
            measured: What the run measured of itself, such as peak memory; added to `run.json`.
        """
        write_frame(self.path / "results.parquet", frame)
        write_json(self.path / "summary.json", summary)
        self.record |= {
            "status": "complete",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(self.record["wall_time_s"] + wall_time_s, 3),
            **measured,
        }
        write_json(self.path / "run.json", self.record)
        _remove_parts(self.path)
        self.close()

    def abandon(self) -> None:
        """Free the directory of a run without a finished batch, which may have been started with the wrong input."""
        if self.is_complete or self.n_parts:
            self.close()
            return
        (self.path / "run.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is missing, or holds something else
            (self.path / "parts").rmdir()
        self.close()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def pause(self, *, wall_time_s: float) -> None:
        """Add the time spent to a run that stops before it is complete."""
        self.record["wall_time_s"] = round(self.record["wall_time_s"] + wall_time_s, 3)
        try:
            write_json(self.path / "run.json", self.record)
        finally:
            self.close()

    def hold(self) -> None:
        """Claim the directory for this process.

        Raises:
            InputError: Another process holds it.
        """
        lock.acquire(self.path / LOCK, self.path)

    def close(self) -> None:
        """Give the directory back to other processes."""
        lock.release(self.path / LOCK)


def open_run(
    path: str | Path, configuration: dict[str, Any], provenance: dict[str, Any], *, joins: bool = False
) -> Run:
    """Start a run in a directory, or resume the run that the directory holds.

    Args:
        path: The run's directory; created if missing.
        configuration: Everything that the numbers depend on. A directory of another configuration is refused.
        provenance: What else is recorded, such as names and paths; may differ between sessions.
        joins: True in a process that joins a run which another process has opened and cleaned up.

    Returns:
        The open run.

    Raises:
        InputError: The directory holds something else, or a run of another configuration (the message names the
            differences), or another process is writing it.
    """
    path = Path(path)
    with naming("out"):
        kind = kind_of(path)
    if kind == "link that leads nowhere":
        raise InputError(f"{path}: is a {kind}; remove it or give another directory")
    if joins or (is_run(path) and has_whole_record(path)):
        run = _resumed(path, configuration)
        if joins or run.is_complete:
            if not joins:
                _remove_parts(path)  # a process was killed when it had just marked the run complete
                lock.forget_the_dead(path / LOCK, path)
            return run
    elif not is_run(path) and kind != "nothing" and (kind != "directory" or _holds_foreign(path)):
        raise InputError(f"{path}: not a run directory (it has no run.json); give an empty or a new directory")
    _make_directory(path)
    with naming("out"):
        lock.acquire(path / LOCK, path)
    try:
        if is_run(path) and (has_whole_record(path) or not _has_parts_of(path, configuration)):
            run = _resumed(path, configuration)  # again, now that nobody else writes it
            if run.is_complete:
                run.close()
            else:
                _sweep_up(path)
            return run
        return _begun(path, configuration, provenance)
    except BaseException:
        lock.release(path / LOCK)
        with contextlib.suppress(OSError):  # it holds something
            path.rmdir()
        raise


def _resumed(path: Path, configuration: dict[str, Any]) -> Run:
    """Return the run that a directory holds.

    Raises:
        InputError: It has another configuration, or its record is broken.
    """
    record = read_record(path)
    differences = _differences(record.get("configuration", {}), configuration)
    if differences:
        raise InputError(f"{path} holds another run: {'; '.join(differences)}. Give another directory as `out`")
    return Run(path, record)


def _begun(path: Path, configuration: dict[str, Any], provenance: dict[str, Any]) -> Run:
    """Write the record of a new run, whose finished batches may be there already."""
    record = {
        "format": FORMAT,
        "status": "running",
        "configuration": configuration,
        **provenance,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_time_s": 0.0,
    }
    _sweep_up(path)
    run = Run(path, record)
    if run.n_parts:
        warnings.warn(
            f"{path / 'run.json'}: broken or cut short; the {run.n_parts} finished batches beside it are of this "
            "configuration and are used",
            stacklevel=3,
        )
    write_json(path / "run.json", record)
    return run


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"`out`: {path}: cannot be written: {error.strerror or error}; give another directory"
        ) from None


def _holds_foreign(path: Path) -> bool:
    """Return whether a directory holds a file that no killed process leaves before its run has a record."""
    try:
        return any(file.suffix != ".part" and file.name != LOCK for file in path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give another directory") from None


def has_whole_record(path: Path) -> bool:
    """Return whether the record of a run is whole; it is not if a disk, a copy or an editor broke it."""
    try:
        return not _fault(json.loads((path / "run.json").read_bytes()))
    except OSError:
        return True  # `read_record` says what is wrong
    except (ValueError, RecursionError):
        return False


def _fault(record: Any) -> str:
    """Return what keeps a JSON value from being the record of a run; empty if nothing does."""
    if not isinstance(record, dict):
        return f"holds a {type(record).__name__}, not an object"
    for key, kind, what in _ENTRIES:
        if key not in record:
            return f"{key} is missing"
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"{key} is not {what}"
        if key == "format" and record[key] != FORMAT:
            return ""  # another version's, whose entries may be others
    if record["status"] not in STATUSES:
        return f"status is not {' or '.join(STATUSES)}"
    if not math.isfinite(record["wall_time_s"]):
        return "wall_time_s is not a number of seconds"
    return ""


def _has_parts_of(path: Path, configuration: dict[str, Any]) -> bool:
    """Return whether a directory holds finished batches, all of them of a configuration."""
    theirs = set()
    for file in _part_files(path):
        with contextlib.suppress(OSError, ValueError):  # broken itself
            theirs.add((pq.read_schema(file).metadata or {}).get(_OF))
    return theirs == {_digest(configuration)}


def _digest(configuration: dict[str, Any]) -> bytes:
    """Return the hash of a configuration, the same in memory and read from `run.json`."""
    return hash_json(json.loads(json.dumps(plain(configuration), sort_keys=True))).encode()


def _part_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / "parts").glob("[!.]*.parquet") if file.is_file())  # a pipe never ends


def _remove_parts(path: Path) -> None:
    parts = path / "parts"
    with contextlib.suppress(FileNotFoundError, PermissionError):  # there are none; a run that may only be read
        for file in parts.iterdir():
            with contextlib.suppress(IsADirectoryError, PermissionError):  # not of a run; its directory stays
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            parts.rmdir()


def _sweep_up(path: Path) -> None:
    """Remove the unfinished files of a process that was killed."""
    for file in (*path.glob(".*.part"), *path.glob("*/.*.part")):
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)


def is_run(path: Path) -> bool:
    """Check whether a directory holds a run, finished or not."""
    try:
        return (path / "run.json").is_file()
    except (OSError, ValueError):  # no directory can have such a name
        return False


def read_record(path: Path) -> dict[str, Any]:
    """Read the `run.json` of a run directory.

    Returns:
        Its content.

    Raises:
        InputError: The file is missing, broken, or of another format.
    """
    file = path / "run.json"
    if (kind := kind_of(file)) == "nothing":
        raise InputError(f"{path}: not a run directory (it has no run.json)")
    if kind != "file":
        raise InputError(f"{file}: is a {kind}; remove it or give another directory")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        fault = _fault(record)
    except PermissionError:
        raise InputError(f"{file}: reading is not permitted; ask for permission or give another directory") from None
    except (ValueError, RecursionError):
        fault = "is no JSON that can be read"
    if fault:
        raise InputError(f"{file}: broken: {fault}; start the run again in another directory, or remove it")
    if record["format"] != FORMAT:
        raise InputError(
            f"{file}: format {record['format']}, but this version reads format {FORMAT}; give another directory"
        )
    return record


def read_finished(path: Path, *commands: str) -> dict[str, Any]:
    """Read the `run.json` of a finished run of one of the given commands.

    Args:
        path: The run directory.
        commands: Names of commands in configurations: `patch` for `dissect patch`, `unlearn eval tofu` as it is.

    Returns:
        The content of `run.json`.

    Raises:
        InputError: The file is missing or broken, the run is of another command, or the run is not finished.
    """
    record = read_record(path)
    command = record["configuration"].get("command")
    if command not in commands:
        wanted = " or ".join(f"`{_typed(name)}`" for name in commands)
        raise InputError(f"{path}: a run of `{_typed(command)}`, not of {wanted}")
    if record["status"] != "complete":
        raise InputError(f"{path}: the run is not finished; rerun the same `{_typed(command)}` command to resume")
    return record


def _typed(command: str) -> str:
    return command if command.startswith("unlearn ") else f"dissect {command}"


def read_frame(path: Path) -> pd.DataFrame:
    """Read a table of a run.

    Returns:
        The table.

    Raises:
        InputError: The table is missing or broken.
    """
    if (kind := kind_of(path)) not in ("file", "nothing"):
        raise InputError(f"{path}: cannot be read: is a {kind}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    return [f"its {_in_words(key)} is {_short(theirs.get(key))}, not {_short(ours.get(key))}" for key in keys]


def _in_words(key: str) -> str:
    """Return a key of a configuration in words, such as `hash of retain` for `retain_sha256`."""
    name = f"hash of {key.removesuffix('_sha256')}" if key.endswith("_sha256") else key
    return (f"number of {name.removeprefix('n_')}" if name.startswith("n_") else name).replace("_", " ")


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def peak_memory_bytes() -> int:
    """Return the peak resident memory of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """A stopwatch that runs from its creation."""

    def __init__(self) -> None:
        """Start the stopwatch."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


@contextlib.contextmanager
def computing(run: Run | None) -> Iterator[Stopwatch]:
    """Time a computation; if it stops, record the time spent so that the run can be resumed.

    Args:
        run: The open run that the computation belongs to, if it is written to disk.

    Yields:
        A stopwatch that runs from the start of the computation.
    """
    clock = Stopwatch()
    if run is not None:
        run.hold()  # a finished run that is added to is held only now
    try:
        yield clock
    except BaseException:
        if run is not None:
            run.pause(wall_time_s=clock.seconds)
        raise
