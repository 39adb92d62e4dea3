"""Determine how much memory a sweep may use."""

from dataclasses import dataclass

import psutil
import torch

from dissect.runtime.processes import processes_on_machine

SHARE_OF_FREE_MEMORY = 0.8
"""Share of the free memory that a run uses by default; the rest is left to other programs."""


@dataclass(frozen=True)
class Budget:
    """Memory that a sweep may use, in bytes, on the machine or on the GPU of the computation.

    Attributes:
        allowed: Largest memory of the process.
        held: Memory that the program and the weights take.
    """

    allowed: int
    held: int

    @property
    def left(self) -> int:
        """Memory for branches and chunks; negative if the program and the weights exceed the budget."""
        return self.allowed - self.held


def memory_budget(device: torch.device, max_memory: int | None, *, weights_to_come: int = 0) -> Budget:
    """Return the memory that a sweep may use.

    Args:
        device: Device of the computation.
        max_memory: Largest memory of the process, in bytes; by default most of the free memory, divided among the
            processes of the same launch.
        weights_to_come: Bytes of weights that will be loaded later.

    Returns:
        The budget, on the GPU if the device is one, else on the machine.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        sharers = -(-processes_on_machine() // torch.cuda.device_count())
        allowed = held + int(free * SHARE_OF_FREE_MEMORY / sharers) if max_memory is None else min(max_memory, total)
    else:
        held = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
        allowed = held + int(free * SHARE_OF_FREE_MEMORY / processes_on_machine()) if max_memory is None else max_memory
    return Budget(allowed=allowed, held=held + weights_to_come)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception reports that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
