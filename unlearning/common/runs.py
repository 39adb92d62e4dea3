"""A run on disk: configuration, tidy tables, resume.

    DIR/run.json          configuration, versions, hashes, wall time, peak memory
    DIR/parts/*.parquet   finished batches of a run that is not complete
    DIR/results.parquet   tidy: one row per example and intervention
    DIR/summary.json      the numbers a paper quotes
    DIR/figures/

Every file is written beside its place and moved there whole, so that a run that is killed leaves whole files only.
"""

import contextlib
import errno
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from unlearning.common.errors import InputError
from unlearning.common.terminal import plain

FORMAT = 1
_VERSIONS = ("dissect-unlearning", "torch", "transformers", "transformer-lens")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file and move it to `path` when it is complete.

    Raises:
        InputError: the disk is full or the place cannot be written to.
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
            raise InputError(f"{path}: the disk is full; make room and run the same command again to go on") from None
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # where the place itself is impossible, so is looking for the part
            part.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole."""
    write_whole(path, lambda part: part.write_bytes(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole; NaN becomes null."""
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet, whole."""
    write_whole(path, lambda part: frame.to_parquet(part, index=False))


@dataclass(eq=False)
class Run:
    """An open run directory.

    Attributes:
        path: the directory.
        record: what is in `run.json`.
    """

    path: Path
    record: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether everything that the configuration asks for is there."""
        return self.record["status"] == "complete"

    @property
    def n_parts(self) -> int:
        """How many finished batches are kept."""
        return len(list((self.path / "parts").glob("*.parquet")))

    def parts(self) -> list[tuple[str, pd.DataFrame]]:
        """The finished batches, by name."""
        files = sorted((self.path / "parts").glob("[!.]*.parquet"))
        return [(file.stem, pd.read_parquet(file)) for file in files]

    def keep_part(self, name: str, frame: pd.DataFrame) -> None:
        """Keep a finished batch, so that a killed run need not compute it again."""
        write_frame(self.path / "parts" / f"{name}.parquet", frame)

    def note(self, **what: Any) -> None:
        """Write something down in `run.json` that no number depends on."""
        self.record |= what
        write_json(self.path / "run.json", self.record)

    def finish(
        self, frame: pd.DataFrame, summary: dict[str, Any], *, wall_time_s: float, measured: dict[str, Any]
    ) -> None:
        """Write the tables and mark the run complete; the parts are no longer needed."""
        write_frame(self.path / "results.parquet", frame)
        write_json(self.path / "summary.json", summary)
        self.record |= {
            "status": "complete",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(self.record["wall_time_s"] + wall_time_s, 3),
            **measured,
        }
        write_json(self.path / "run.json", self.record)
        parts = self.path / "parts"
        if parts.is_dir():
            for file in parts.iterdir():
                file.unlink()
            parts.rmdir()

    def pause(self, *, wall_time_s: float) -> None:
        """Note the time spent in a run that stops before its end."""
        self.record["wall_time_s"] = round(self.record["wall_time_s"] + wall_time_s, 3)
        write_json(self.path / "run.json", self.record)


def open_run(
    path: str | Path, configuration: dict[str, Any], provenance: dict[str, Any], *, joins: bool = False
) -> Run:
    """Start a run in a directory, or go on with the one that is there.

    Args:
        path: the run's directory; made when it is not there.
        configuration: everything that the numbers depend on. A directory of another configuration is refused.
        provenance: what else is worth keeping, as names and paths; free to differ.
        joins: another process has opened the run already and cleans up.

    Raises:
        InputError: the directory holds something else, or a run of another configuration (in what it differs).
    """
    path = Path(path)
    if is_run(path):
        record = read_record(path)
        differences = _differences(record.get("configuration", {}), configuration)
        if differences:
            raise InputError(f"{path} holds another run: {'; '.join(differences)}. Name another --out directory")
        if not joins:
            _sweep_up(path)
        return Run(path, record)
    if path.exists() and (not path.is_dir() or any(file.suffix != ".part" for file in path.iterdir())):
        raise InputError(f"{path}: not a run directory (no run.json in it); name an empty or a new one")
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
    write_json(path / "run.json", record)
    return Run(path, record)


def _sweep_up(path: Path) -> None:
    """Remove what a process that was killed in the middle of a file left behind."""
    for file in (*path.glob(".*.part"), *path.glob("*/.*.part")):
        file.unlink(missing_ok=True)


def is_run(path: Path) -> bool:
    """Whether a directory holds a run, finished or not."""
    return (path / "run.json").is_file()


def read_record(path: Path) -> dict[str, Any]:
    """The `run.json` of a run directory.

    Raises:
        InputError: it is not there, broken, or of another format.
    """
    file = path / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not a run directory (no run.json in it)") from None
    except PermissionError:
        raise InputError(f"{file}: may not be read; ask for permission or name another directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{file}: broken; the directory is not whole, start the run anew elsewhere") from None
    if not isinstance(record, dict) or not record.keys() >= {"format", "status", "configuration"}:
        raise InputError(f"{file}: not the record of a run; name another directory")
    if record["format"] != FORMAT:
        raise InputError(f"{file}: format {record['format']}, and this version reads {FORMAT}; name another directory")
    return record


def read_finished(path: Path, *commands: str) -> dict[str, Any]:
    """The `run.json` of a finished run of one of these commands.

    Args:
        path: of the run.
        commands: as configurations name them: `patch` is `dissect patch`, `unlearn eval tofu` is that.

    Raises:
        InputError: what `read_record` raises, a run of another command, or one that is not finished.
    """
    record = read_record(path)
    command = record["configuration"].get("command")
    if command not in commands:
        wanted = " or ".join(f"`{_typed(name)}`" for name in commands)
        raise InputError(f"{path}: a run of `{_typed(command)}`, not of {wanted}")
    if record["status"] != "complete":
        raise InputError(f"{path}: the run is not finished; run the same `{_typed(command)}` command again to go on")
    return record


def _typed(command: str) -> str:
    return command if command.startswith("unlearn ") else f"dissect {command}"


def read_frame(path: Path) -> pd.DataFrame:
    """A table of a run.

    Raises:
        InputError: it is not there, or broken.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    return [f"its {key} is {_short(theirs.get(key))}, not {_short(ours.get(key))}" for key in keys]


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def peak_memory_bytes() -> int:
    """Most memory that the process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
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
    try:
        yield clock
    except BaseException:
        if run is not None:
            run.pause(wall_time_s=clock.seconds)
        raise
