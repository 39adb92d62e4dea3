"""Hash the tensors of a checkpoint on disk, and cache the hashes until its files change."""

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
"""Number of threads. Hashing takes as long as reading, so one thread hashes while the other reads."""


def fingerprint(files: TensorFiles, *, name: str, progress: bool = False) -> dict[str, str]:
    """Hash every tensor of a checkpoint, and check that its values are finite.

    Hashes are cached under `$XDG_CACHE_HOME/dissect/fingerprints` (by default in `~/.cache`) as long as path, size and
    times of modification and change of every file stay the same.

    Args:
        files: Files of the checkpoint.
        name: Name of the checkpoint for messages.
        progress: Show a progress bar on stderr.

    Returns:
        The `tensor_hash` of every tensor, by its name on disk.

    Raises:
        InputError: A file cannot be read, or a tensor has a value that is not finite (the message names the tensor).
    """
    state = [_state(file) for file in files.files]
    cached = _cache() / f"{hashlib.sha256(os.fsencode(files.path.resolve())).hexdigest()}.json"
    known = _cached_hashes(cached, state)
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
    with contextlib.suppress(InputError):  # if the cache is not writable, hashes are recomputed next time
        write_bytes(cached, json.dumps({"format": FORMAT, "files": state, "tensors": hashes}).encode())
    return hashes


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dissect" / "fingerprints"


def _state(file: Path) -> list[str | int]:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; copy the file again") from None
    # A copy may keep the size and the time of its source, but not the time at which the file itself changed.
    return [file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cached_hashes(cached: Path, state: list[list[str | int]]) -> dict[str, str] | None:
    """Return the cached hashes of files in a state; None if there are none, or if the cache is broken."""
    try:
        record = json.loads(cached.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["files"] == state:
            return {str(name): str(sha256) for name, sha256 in record["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
