"""Choose how many tokens go through a block at once, and shrink that number when memory runs out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from dissect.runtime.memory import is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class Chunk:
    """Number of tokens that go through a block at once; halved when memory runs out.

    Attributes:
        tokens: The number, usually measured by `measure_chunk`: small chunks leave the processor's parallelism unused,
            large ones exceed its caches.
    """

    tokens: int

    def run(self, items: Sequence[T], tokens_each: int, run: Callable[[Sequence[T]], R]) -> Iterator[R]:
        """Run items in groups of about one chunk, at least one item at a time.

        Args:
            items: Items to run, in order.
            tokens_each: Number of tokens of one item.
            run: Function that runs a group of items.

        Yields:
            The result of each group.

        Raises:
            RuntimeError: One item alone does not fit into memory, or `run` failed for another reason.

        Warns:
            UserWarning: Memory ran out; the remaining items are run in smaller groups.
        """
        done = 0
        while done < len(items):
            group = items[done : done + self.n_items(tokens_each)]
            try:
                result = run(group)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if len(group) == 1 or not is_out_of_memory(error):
                    raise
            else:
                done += len(group)
                yield result
                continue
            self.shrink((len(group) // 2) * tokens_each)

    def n_items(self, tokens_each: int) -> int:
        """Return the number of items nearest to one chunk, at least 1; up to half more than a chunk.

        A small remainder would cost more than a chunk that is somewhat too large.

        Returns:
            The number of items, at least 1.
        """
        return max(1, round(self.tokens / tokens_each))

    def shrink(self, tokens: int) -> None:
        """Set a smaller size, free cached memory, and warn."""
        self.tokens = tokens
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: continuing with chunks of {self.tokens} tokens", stacklevel=3)
