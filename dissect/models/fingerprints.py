"""Hashes of the tensors of a checkpoint on disk: one pass over its files, remembered while they do not change."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unlearning.checkpoints.hashing import HASHED_AT_ONCE, finite_hash
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.common.runs import write_bytes

FORMAT = 1
_THREADS = 2
"""Hashing is as slow as reading; one thread hashes while the other reads."""


def fingerprint(files: TensorFiles, *, name: str, progress: bool = False) -> dict[str, str]:
    """The `tensor_hash` of every tensor by its name on disk, checked to be finite.

    Hashes are kept under `$XDG_CACHE_HOME/dissect/fingerprints` (by default in `~/.cache`) for as long as path, size
    and modification time of every file stay the same.

    Args:
        files: the checkpoint.
        name: what errors call it.
        progress: show a progress bar on stderr.

    Raises:
        InputError: a file cannot be read, or a tensor holds a value that is not finite (which).
    """
    state = [_state(file) for file in files.files]
    place = _cache() / f"{hashlib.sha256(os.fsencode(files.path.resolve())).hexdigest()}.json"
    known = _recall(place, state)
    if known is not None and known.keys() == files.tensors.keys():
        return known

    def hash_one(tensor: str) -> tuple[str, str]:
        return tensor, finite_hash(files.pieces(tensor, HASHED_AT_ONCE), key=tensor, name=name)

    hashes: dict[str, str] = {}
    with (
        Progress(len(files.tensors), f"checking {name}", show=progress) as bar,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="fingerprint") as threads,
    ):
        for tensor, sha256 in threads.map(hash_one, files.tensors):
            hashes[tensor] = sha256
            bar.advance(1)
    with contextlib.suppress(InputError):  # a home that cannot be written to only costs the next run its time
        write_bytes(place, json.dumps({"format": FORMAT, "files": state, "tensors": hashes}).encode())
    return hashes


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dissect" / "fingerprints"


def _state(file: Path) -> list[str | int]:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; copy it again") from None
    return [file.name, status.st_size, status.st_mtime_ns]


def _recall(place: Path, state: list[list[str | int]]) -> dict[str, str] | None:
    """The kept hashes of files in this state; None where there are none, whatever is wrong with them."""
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["files"] == state:
            return {str(name): str(sha256) for name, sha256 in record["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
