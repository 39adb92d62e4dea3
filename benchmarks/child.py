"""`dissect patch` in a process of its own, watched from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from unlearning.common.errors import InputError

_INTERVAL = 0.05
"""Seconds between two looks at the process."""


@dataclass(frozen=True)
class Finished:
    """A finished run of `dissect patch`.

    Attributes:
        record: Content of its `run.json`.
        seconds: Wall time of the process, loading included.
        peak_bytes: Peak resident memory of the started process; its children are not counted.
    """

    record: dict[str, Any]
    seconds: float
    peak_bytes: int


def patch_command(arguments: Sequence[str], *, processes: int = 1) -> list[str]:
    """Return the command that starts `dissect patch`, under torchrun if it is to run in several processes."""
    if processes == 1:
        return [sys.executable, "-m", "dissect", "patch", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "-m", "dissect", "patch", *arguments]


def run_patch(arguments: Sequence[str], out: Path, *, processes: int = 1, threads: int | None = None) -> Finished:
    """Run `dissect patch` into a new directory; its messages go to stderr.

    Args:
        arguments: All arguments but `--out`.
        out: The run directory.
        processes: Number of processes, started by torchrun if more than one.
        threads: Threads of each process; None leaves the number to torch.

    Returns:
        The run's record, its wall time in seconds and the peak of its resident memory in bytes.

    Raises:
        InputError: The command failed.
    """
    from unlearning.common.runs import read_record

    command = patch_command([*arguments, "--out", str(out)], processes=processes)
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    start = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    try:
        while child.poll() is None:
            peak = max(peak, peak_resident_bytes(child.pid))
            time.sleep(_INTERVAL)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    seconds = time.perf_counter() - start
    if child.returncode != 0:
        raise InputError(f"dissect patch exited with {child.returncode}; what it said stands above")
    return Finished(read_record(out), seconds, peak)


def peak_resident_bytes(pid: int) -> int:
    """Return the kernel's high-water mark of a process's resident memory in bytes, or 0 if the process has ended.

    `ru_maxrss` would be wrong: a child's begins at its parent's peak, and the parent has written gigabytes of weights.

    Args:
        pid: The process.

    Returns:
        Bytes; on a system without `/proc`, the memory that is resident now.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        marks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(marks[0]) * 1024 if marks else 0
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)  # no /proc here: what it holds now must do
    except psutil.NoSuchProcess:
        return 0
