"""One process at a time writes a directory: a file that names the holder claims it.

The file appears whole or not at all, and only if there is none. A holder that has died loses it: its process id is
gone from this machine, or belongs to a process that was started at another time. Nothing can be known about a holder on
another machine, or in another container, whose processes cannot be seen from here: it keeps the directory.
"""

import atexit
import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from unlearning.common.errors import InputError
from unlearning.common.places import kind_of

CUT_SHORT_S = 30.0
"""Age in seconds after which a lock that names no holder is that of a dead process; writing it takes far less."""

_MAX_BYTES = 2**16
"""More than any lock holds."""

_held: dict[Path, bytes] = {}
"""The lock files that this process holds, with their content."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a directory.

    Attributes:
        host: Name of the machine.
        machine: What a process id belongs to: the machine's start and the namespace of its process ids.
        process: Process id.
        started: When the process started, in seconds since 1970; a process id alone may be used again.
        since: When it claimed the directory.
    """

    host: str
    machine: str
    process: int
    started: float
    since: str

    @property
    def is_gone(self) -> bool:
        """True if the process has certainly ended."""
        if self.machine != _machine():
            return False
        try:
            other = psutil.Process(self.process)
            return abs(other.create_time() - self.started) > 2 or other.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        """Return the holder in words."""
        return f"process {self.process} on {self.host}, since {self.since}"


def acquire(file: Path, directory: Path) -> None:
    """Claim a directory for this process; does nothing if it holds it already.

    Args:
        file: The lock file; its directory must exist.
        directory: The directory that it stands for, for messages.

    Raises:
        InputError: Another process holds the directory, or the file cannot be written.
    """
    file = file.absolute()
    if file in _held:
        return
    content = f"{json.dumps(asdict(_this_process()))}\n".encode()
    for _ in range(100):  # each turn, another process was faster
        try:
            _create(file, content)
        except FileExistsError:
            _take_from_the_dead(file, directory)
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
            raise InputError(
                f"{directory}: cannot be written: {why}; make room, ask for permission or give another directory"
            ) from None
        else:
            _held[file] = content
            for part in file.parent.glob(f"{glob.escape(file.name)}.*.part"):  # of a process killed while it claimed
                with contextlib.suppress(OSError):  # a directory, which is none of ours
                    part.unlink()
            return
    raise InputError(f"{directory}: several processes want to write it at once; start one of them")


def release(file: Path) -> None:
    """Give a directory back that `acquire` claimed; does nothing if this process does not hold it."""
    file = file.absolute()
    content = _held.pop(file, None)
    with contextlib.suppress(OSError):  # somebody removed it, or the directory
        if content is not None and kind_of(file) == "file" and file.read_bytes() == content:
            file.unlink()


def forget_the_dead(file: Path, directory: Path) -> None:
    """Remove the lock of a process that was killed when it had finished; any other lock stays."""
    with contextlib.suppress(InputError, OSError):
        _take_from_the_dead(file.absolute(), directory)


@contextlib.contextmanager
def holding(file: Path, directory: Path) -> Iterator[None]:
    """Hold a directory; see `acquire`."""
    acquire(file, directory)
    try:
        yield
    finally:
        release(file)


def _create(file: Path, content: bytes) -> None:
    """Create a file with its content at once.

    Raises:
        FileExistsError: The file exists.
    """
    part = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        try:
            os.link(part, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: in two steps, and a reader may find it cut short
            with file.open("xb") as created:
                created.write(content)
    finally:
        part.unlink(missing_ok=True)


def _take_from_the_dead(file: Path, directory: Path) -> None:
    """Remove the lock of a process that has ended.

    Of several processes that find the same dead holder, one removes its lock: they queue for that very file, and those
    that come late see that another one is there.

    Raises:
        InputError: The holder is alive, or may be; or what is there is no lock.
    """
    if file.is_symlink() or kind_of(file) not in ("file", "nothing"):
        what = "link" if file.is_symlink() else kind_of(file)
        raise InputError(f"{directory}: {file} is a {what} and no lock of a process; remove it")
    with contextlib.suppress(FileNotFoundError), file.open("rb") as there:
        with contextlib.suppress(OSError):  # a file system that knows no such queue
            fcntl.flock(there, fcntl.LOCK_EX)
        # A clock that was set back leaves locks from the future.
        content, age = there.read(_MAX_BYTES), abs(time.time() - os.fstat(there.fileno()).st_mtime)
        holder = _read(content)
        if holder is not None and not holder.is_gone:
            where = "" if holder.machine == _machine() else f"; if that process is no more, remove {file}"
            raise InputError(
                f"{directory} is being written by {holder}; wait until it has ended or give another directory as `out`"
                f"{where}"
            )
        if holder is None and age < CUT_SHORT_S:
            raise InputError(
                f"{directory} is being written by another process, which was about to say its name; try again in "
                f"{CUT_SHORT_S:.0f} seconds"
            )
        if os.fstat(there.fileno()).st_ino == file.stat().st_ino:
            file.unlink()


def _read(content: bytes) -> Holder | None:
    """Return the holder that a lock file names; None if it was cut short."""
    try:
        record = json.loads(content)
        process, started = int(record["process"]), float(record["started"])
        if not (0 < process < 2**31 and math.isfinite(started)):
            return None
        return Holder(str(record["host"]), str(record["machine"]), process, started, str(record["since"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _this_process() -> Holder:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    me = psutil.Process()
    return Holder(platform.node(), _machine(), me.pid, me.create_time(), now)


def _machine() -> str:
    """Return what process ids belong to: containers and machines that were started anew have others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{platform.node()} {psutil.boot_time():.0f}"


@atexit.register
def _release_all() -> None:
    for file in list(_held):
        release(file)


def _forget_all() -> None:
    """A forked process holds nothing of what its parent holds."""
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)
