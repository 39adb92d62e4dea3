"""How much goes through a block at once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class Chunk:
    """How many tokens go through a block at once; halved when memory does not suffice.

    Attributes:
        tokens: the size, a measured choice: small ones waste the machine's parallelism, large ones its caches.
    """

    tokens: int

    def run(self, items: Sequence[T], tokens_each: int, run: Callable[[Sequence[T]], R]) -> Iterator[R]:
        """Run about as many items at a time as make a chunk, at least one; yields what each time gave.

        Raises:
            RuntimeError: even one does not fit into memory, or something else went wrong.

        Warns:
            UserWarning: memory did not suffice, and it goes on with smaller chunks.
        """
        done = 0
        while done < len(items):
            some = items[done : done + self.holds(tokens_each)]
            try:
                result = run(some)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if len(some) == 1 or not is_out_of_memory(error):
                    raise
            else:
                done += len(some)
                yield result
                continue
            self.shrink((len(some) // 2) * tokens_each)

    def holds(self, tokens_each: int) -> int:
        """How many items come nearest to a chunk: at most half more than it, since a small rest costs more."""
        return max(1, round(self.tokens / tokens_each))

    def shrink(self, tokens: int) -> None:
        """Go on with smaller chunks, and say so."""
        self.tokens = tokens
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with chunks of {self.tokens} tokens", stacklevel=3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
