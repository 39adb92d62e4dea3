"""Seconds and memory of one call, and the order in which contestants are called."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import psutil
import torch

from benchmarks.child import peak_resident_bytes
from benchmarks.gemm import synchronize

T = TypeVar("T")

_INTERVAL = 0.02
"""Seconds between two looks at the memory, where the kernel does not keep its peak."""


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A call's result, time and memory.

    Attributes:
        value: The result.
        seconds: Wall time.
        memory_bytes: Peak memory above that at the start: resident on a CPU, allocated on a GPU.
    """

    value: T
    seconds: float
    memory_bytes: int


def measure(call: Callable[[], T], device: torch.device) -> Measured[T]:
    """Call a function and measure its wall time and its peak memory.

    On a CPU the peak is the kernel's own high-water mark, which is reset before the call: sampling would miss memory
    that is held for a moment, such as the gradient of a large embedding. Where Linux does not allow the reset, the
    memory is sampled. Memory that the allocator kept from an earlier call is handed back first.

    Args:
        call: The function.
        device: Where it computes.

    Returns:
        Its result, seconds, and peak bytes above those at the start.
    """
    gc.collect()
    _hand_memory_back(device)
    memory = _DevicePeak(device) if device.type == "cuda" else _HighWaterMark() if _set_back() else _ResidentPeak()
    with memory:
        value, seconds = timed(call, device)
    return Measured(value, seconds, memory.bytes_above_start)


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Call, undisturbed; returns the result and the seconds of wall time."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    value = call()
    synchronize(device)
    return value, time.perf_counter() - start


def rotated(items: Sequence[T], turns: int) -> list[T]:
    """Return the items in order, starting from another item every turn, so that no item always follows the same one."""
    start = turns % len(items)
    return [*items[start:], *items[:start]]


def _set_back() -> bool:
    """Set the high-water mark of resident memory to what is resident now; false where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class _HighWaterMark:
    """Peak resident memory above that at the start, from the kernel."""

    def __enter__(self) -> None:
        _set_back()
        self._start = peak_resident_bytes(os.getpid())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes_above_start = peak_resident_bytes(os.getpid()) - self._start


class _ResidentPeak:
    """Peak resident memory above that at the start, sampled from another thread."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._start = self._peak = 0

    def __enter__(self) -> None:
        self._start = self._peak = self._process.memory_info().rss
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes_above_start(self) -> int:
        return int(self._peak - self._start)


class _DevicePeak:
    """Peak memory allocated on a GPU above that at the start, from torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._peak = 0

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peak = torch.cuda.max_memory_allocated(self._device)

    @property
    def bytes_above_start(self) -> int:
        return self._peak - self._start


def _hand_memory_back(device: torch.device) -> None:
    if device.type == "cuda":
        return  # torch counts what is allocated there, and not what its allocator keeps
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: what the allocator keeps is then counted to nobody
