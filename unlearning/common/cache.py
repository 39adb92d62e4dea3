"""The directory of results that later runs may find again; a hash of all that a result depends on names its file.

    DIR/reference/KEY.npy            outputs of the model before training; KEY.json says of which model and data
    DIR/evaluation/KEY/              evaluations of controls, each a run directory
    DIR/models/FAMILY/RECIPE/NAME/   built-in models that were trained on this machine

A process that reads or writes a file of `reference` holds a lock on it, so that nobody removes it.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unlearning.common.errors import InputError

LIMIT = "UNLEARNING_CACHE_GB"
"""Environment variable: GB (10^9 bytes) that the files of `reference` may take together."""
DEFAULT_LIMIT_GB = 20.0

_KEY = re.compile("[0-9a-f]{32}")


def cache_root() -> Path:
    """Return the cache directory: $UNLEARNING_CACHE if that is set, else `unlearning` of the user's cache directory."""
    named = os.environ.get("UNLEARNING_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "unlearning"


def cache_directory(kind: str) -> Path:
    """Return the directory of one kind of result, in `cache_root`.

    Args:
        kind: Name of the kind.

    Returns:
        The directory, which may be missing.
    """
    return cache_root() / kind


def cache_limit() -> float:
    """Return how many bytes the files of `reference` may take together.

    Raises:
        InputError: The environment variable is no number of GB.
    """
    text = os.environ.get(LIMIT, "").strip()
    try:
        limit = float(text) if text else DEFAULT_LIMIT_GB
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise InputError(f"the environment variable {LIMIT} must be a number of GB, at least 0, got {text[:40]!r}")
    return limit * 1e9


@dataclass(frozen=True)
class Entry:
    """One result in the cache.

    Attributes:
        kind: "reference", "evaluation" or "models".
        path: Its file or directory.
        what: What it holds.
        model: Name of the model that it was computed from; empty if that is not known.
        data: The data that it was computed on; empty if there are none.
        size: In bytes, with what describes it.
        used: When it was last used, in seconds since 1970.
        in_use: A process reads or writes it.
    """

    kind: str
    path: Path
    what: str
    model: str
    data: str
    size: int
    used: float
    in_use: bool

    def remove(self) -> bool:
        """Remove it from the disk, unless it is in use.

        Returns:
            True if it is gone.

        Raises:
            InputError: Removing is not permitted.
        """
        try:
            if self.path.is_dir():
                if self.in_use:
                    return False
                shutil.rmtree(self.path)
                for parent in list(self.path.parents)[:2] if self.kind == "models" else []:
                    with contextlib.suppress(OSError):  # it holds other models
                        parent.rmdir()
                return True
            return _remove_file(self.path)
        except FileNotFoundError:  # another process was faster
            return True
        except OSError as error:
            raise InputError(f"{self.path}: cannot be removed: {error.strerror or error}; ask for permission") from None


def list_cache() -> list[Entry]:
    """Return all results in the cache, the longest unused first; files of others in the same directories are left out.

    Raises:
        InputError: The cache directory cannot be read.
    """
    root = cache_root()
    try:
        found = [entry for kind in _KINDS for entry in _KINDS[kind](root / kind)]
    except OSError as error:
        raise InputError(f"{error.filename or root}: cannot be read: {error.strerror}; ask for permission") from None
    return sorted(found, key=lambda entry: entry.used)


def make_room(needed: int) -> None:
    """Remove files of `reference` until a new one fits below the limit: first those that are longest unused.

    What is in use, or may not be removed, stays, even if the limit is exceeded then.

    Args:
        needed: Size of the new file in bytes.
    """
    found: list[tuple[float, int, Path]] = []
    for path in _reference_files(cache_directory("reference")):
        with contextlib.suppress(OSError):  # another process removed it, or may remove it alone
            found.append((path.stat().st_mtime, _size_of(path), path))
    limit, total = cache_limit(), sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        leftover = path.suffix != ".npy"  # of a process that was killed while it wrote
        if total + needed > limit or leftover:
            with contextlib.suppress(OSError):  # also removed by another process, which may be making room too
                total -= size if _remove_file(path) else 0


def hold(descriptor: int) -> None:
    """Lock an open file of the cache against removal, until it is closed; several processes may do so at once."""
    _locked(descriptor, fcntl.LOCK_SH)


def created(path: Path) -> BinaryIO:
    """Open a new file of the cache to write it, locked until it is closed.

    Until it is locked, another process may take it for a leftover and remove it (`make_room`); then it is made again.

    Args:
        path: The file.

    Returns:
        The open file, which `path` names.
    """
    while True:
        file = path.open("wb")
        _locked(file.fileno(), fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def described_by(file: Path) -> Path:
    """Return the file that says what a file of `reference` holds."""
    return file.with_suffix(".json")


def _locked(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:  # held by another process, or a file system without locks, where nothing is known
        return False
    return True


def _remove_file(path: Path) -> bool:
    """Remove a file of `reference` and what describes it, unless a process holds it; return True if it is gone."""
    with path.open("rb") as file:
        if not _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        path.unlink()
        described_by(path).unlink(missing_ok=True)
    return True


def _reference_files(directory: Path) -> list[Path]:
    """Return the files of `reference`, also those that are being written."""
    files = sorted(directory.glob("*.npy")) + sorted(directory.glob(".*.npy.partial-*"))
    return [path for path in files if _KEY.fullmatch(path.name.lstrip(".").partition(".")[0])]


def _size_of(path: Path) -> int:
    """Return the size in bytes of a file of `reference`, with what describes it."""
    described = described_by(path)
    return path.stat().st_size + (described.stat().st_size if described.is_file() else 0)


def _references(directory: Path) -> Iterator[Entry]:
    for path in _reference_files(directory):
        with contextlib.suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
            in_use = not _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = path.suffix == ".npy"
            said = _described(described_by(path)) if whole else {}
            what = str(said.get("what", "outputs of a model")) if whole else "unfinished outputs of a model"
            names = str(said.get("model", "")), str(said.get("data", ""))
            yield Entry("reference", path, what, *names, _size_of(path), path.stat().st_mtime, in_use)


def _evaluations(directory: Path) -> Iterator[Entry]:
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if _KEY.fullmatch(path.name) and (path / "run.json").is_file():
            record = _described(path / "run.json")
            configuration = record.get("configuration", {})
            what = str(configuration.get("command", "evaluation")).removeprefix("unlearn ")
            data = str(configuration.get("split") or configuration.get("corpus") or "")
            yield _directory("evaluation", path, path / "run.json", what, str(record.get("model", "")), data)


def _models(directory: Path) -> Iterator[Entry]:
    for record in sorted(directory.glob("*/*/*/unlearning.json")):
        path = record.parent
        name = f"{path.parents[1].name}:{path.name}"
        yield _directory("models", path, record, "built-in model", name, "")


def _directory(kind: str, path: Path, record: Path, what: str, model: str, data: str) -> Entry:
    status = record.stat()
    size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    held = (path / ".lock").exists() or (path.parent / f".{path.name}.lock").exists()
    return Entry(kind, path, what, model, data, size, max(status.st_mtime, status.st_atime), held)


_KINDS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "reference": _references,
    "evaluation": _evaluations,
    "models": _models,
}


def _described(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def older_than(entries: Sequence[Entry], days: float) -> list[Entry]:
    """Return the results that were not used for a number of days."""
    return [entry for entry in entries if entry.used < time.time() - days * 86_400]
