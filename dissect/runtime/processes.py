"""Let several processes share one run, whatever starts them.

    torchrun --nproc_per_node 2 -m dissect patch --base B --unlearned U
    accelerate launch --multi_gpu --num_processes 2 -m dissect patch --base B --unlearned U

Both are meant for GPUs, one for each process, and both work on a machine without a GPU. (`--multi_gpu` makes accelerate
start several processes; `accelerate launch --cpu --num_processes 2` starts one without a message.) Any other launcher
that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT works too. Launchers set OMP_NUM_THREADS=1; set it to
(cores / processes) if there are more cores than processes.

The first process opens the run, plans, shows the progress and writes the results. All processes compute, and keep what
they have finished. If one of them stops too early, the others stop too and show its reason. The same command then
resumes the run, with any number of processes.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.runtime.link import Link

T = TypeVar("T")

LINGER_S = 2.0
"""Time, in seconds, that a failed process waits before it ends.

Launchers end all processes when one ends, and the first process has to show the reason before that.
"""


@dataclass(frozen=True)
class Processes:
    """The processes of one launch, seen from one of them.

    Attributes:
        rank: Index of this process; process 0 writes the results.
        count: Number of processes.
        link: Connection to the other processes; None if there is only one.
    """

    rank: int = 0
    count: int = 1
    link: "Link | None" = None

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """Return this process's part of a list of work; all parts cost about the same.

        Args:
            items: All items, the same in every process.
            cost: Returns the cost of an item.

        Returns:
            The items of this process, in the order of the list.
        """
        loads = [0.0] * self.count
        mine = []
        for index in sorted(range(len(items)), key=lambda index: cost(items[index]), reverse=True):
            lightest = loads.index(min(loads))
            loads[lightest] += cost(items[index])
            if lightest == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def gather(self, mine: list[T]) -> list[T]:
        """Return the items of all processes in the order of their ranks, in every process."""
        return mine if self.link is None else self.link.gather(mine)

    def once(self, make: Callable[[], T]) -> T:
        """Call a function in the first process, and return its result in every process."""
        return self.gather([make()] if self.rank == 0 else [])[0]

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.link is not None:
            self.link.wait()


ALONE = Processes()
"""A launch with only this process."""


@contextmanager
def join_processes(*, device: str | None = None) -> Iterator[Processes]:
    """Join the launch that started this process, if there is one; call it in the main thread.

    Args:
        device: Device that the user named; None to give each process its own GPU.

    Yields:
        The processes of the launch.

    Raises:
        InputError: The other processes cannot be reached, or one of them stopped (the message says which, and why).
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE
        return
    from dissect.runtime.link import joined_link

    rank = _number("RANK", None)
    if not 0 <= rank < count:
        raise InputError(
            f"RANK must be between 0 and {count - 1} for WORLD_SIZE={count}, got {rank}. "
            "Start with torchrun, or unset both."
        )
    if device is None:
        _take_gpu()
    with joined_link(rank, count) as link:
        yield Processes(rank, count, link)


@contextmanager
def silence_other_processes() -> Iterator[None]:
    """Discard the output of all processes of a launch except the first; unexpected exceptions are shown by each."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torch reads this when it is imported. Its own messages about a lost connection would hide our error.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except SystemExit as stop:
        if stop.code:
            time.sleep(LINGER_S)
        raise


def processes_on_machine() -> int:
    """Return the number of processes of this launch on this machine."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))


def _take_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())


def _number(variable: str, default: int | None) -> int:
    """Return an integer from an environment variable that the launcher sets."""
    text = os.environ.get(variable, default)
    try:
        return int(text)  # type: ignore[arg-type]  # None is handled below
    except (TypeError, ValueError):
        raise InputError(
            f"{variable} must be an integer, got {text}. Start with torchrun, or unset WORLD_SIZE."
        ) from None
