"""How much memory a sweep may use."""

from dataclasses import dataclass

import psutil
import torch

from dissect.runtime.processes import processes_on_machine

SHARE_OF_FREE_MEMORY = 0.8
"""Of what is free, how much a run takes unless told: other programs live on the machine too."""


@dataclass(frozen=True)
class Budget:
    """Memory that a sweep may use, in bytes: of the machine, or of the GPU that it computes on.

    Attributes:
        allowed: how much the process may hold altogether.
        held: how much of that is taken: by the program, and by weights.
    """

    allowed: int
    held: int

    @property
    def left(self) -> int:
        """What is left for streams and chunks; negative where the rest takes too much already."""
        return self.allowed - self.held


def memory_budget(device: torch.device, max_memory: int | None, *, weights_to_come: int = 0) -> Budget:
    """What a sweep may use.

    Args:
        device: where it computes.
        max_memory: bytes that the process may hold altogether; by default most of what is free, shared with the
            processes of the same launch.
        weights_to_come: bytes of weights that are not in memory yet and will be.
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
