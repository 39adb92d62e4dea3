"""Several processes that share one run, whatever starts them.

    torchrun --nproc_per_node 2 -m dissect patch --base B --unlearned U
    accelerate launch --multi_gpu --num_processes 2 -m dissect patch --base B --unlearned U

Both are meant for GPUs, where each process takes one, and both work on a machine without any (`--multi_gpu` only makes
accelerate start several: `accelerate launch --cpu --num_processes 2` starts one and says nothing). Anything else that
sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT will do. Launchers set OMP_NUM_THREADS=1: give it as
(cores / processes) where there are more cores than processes.

The first process opens the run, plans, shows the progress, and writes the results; all compute and keep what they have
finished. Where one ends before its time the others end too, with its reason; the same command goes on from there, with
any number of processes.
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
"""How long a process that failed stays: launchers end all when one ends, and the first has to tell the reason."""


@dataclass(frozen=True)
class Processes:
    """The processes of one launch, as one of them sees it.

    Attributes:
        rank: its number; 0 writes the results.
        count: how many there are.
        link: what joins them; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    link: "Link | None" = None

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This process's part of a list of work, in the list's order; all parts cost about the same."""
        loads = [0.0] * self.count
        mine = []
        for index in sorted(range(len(items)), key=lambda index: cost(items[index]), reverse=True):
            lightest = loads.index(min(loads))
            loads[lightest] += cost(items[index])
            if lightest == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def gather(self, mine: list[T]) -> list[T]:
        """What all processes have, in the order of their ranks; every process gets it."""
        return mine if self.link is None else self.link.gather(mine)

    def once(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process."""
        return self.gather([make()] if self.rank == 0 else [])[0]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.link is not None:
            self.link.wait()


ALONE = Processes()


@contextmanager
def join_processes(*, device: str | None = None) -> Iterator[Processes]:
    """Join the launch that started this process, where there is one; must be entered by the main thread.

    Args:
        device: where the user wants it to compute; unless it is named, each process gets a GPU.

    Raises:
        InputError: the others cannot be reached, or one of them stopped (which, and why).
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE
        return
    from dissect.runtime.link import joined_link

    rank = _number("RANK", None)
    if not 0 <= rank < count:
        raise InputError(f"RANK is {rank} of a WORLD_SIZE of {count}: start with torchrun, or unset both")
    if device is None:
        _take_gpu()
    with joined_link(rank, count) as link:
        yield Processes(rank, count, link)


@contextmanager
def silence_other_processes() -> Iterator[None]:
    """Keep all processes of a launch silent but the first; errors that nobody foresaw are shown by each."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Read when torch is loaded: its own account of a lost connection would hide the line that says whose.
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
    """How many processes of this launch are on this machine."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))


def _take_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())


def _number(variable: str, default: int | None) -> int:
    """A number that the launcher has put into the environment."""
    text = os.environ.get(variable, default)
    try:
        return int(text)  # type: ignore[arg-type]  # None is one of the mistakes
    except (TypeError, ValueError):
        raise InputError(f"{variable} is {text}: start with torchrun, or unset WORLD_SIZE") from None
