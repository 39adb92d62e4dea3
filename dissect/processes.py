"""Several processes that share one run: `torchrun -m dissect patch ...`, `accelerate launch -m dissect patch ...`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one launch, as one of them sees it.

    Attributes:
        rank: its number; 0 writes the results.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list of work."""
        return list(items[self.rank :: self.count])

    def gather(self, mine: list[T]) -> list[T]:
        """What all processes have, in the order of their ranks; every process gets it."""
        return mine

    def wait(self) -> None:
        """Go on when all processes have come here."""

    def check(self) -> None:
        """Stop where another process has stopped.

        Raises:
            InputError: another process stopped (which, and why).
        """


ALONE = Processes()
