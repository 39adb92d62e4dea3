"""Order of the examples: which of them an optimizer step reads, as a function of the seed and the step alone.

The order is the same on any number of processes, resumed or not. A step batch is everything that one optimizer step
reads; it is cut into micro-batches by length, which changes the padding and no number, because losses are normalised by
the whole step batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class StepPlan:
    """The examples that one process reads in one optimizer step, as indices into the data.

    Attributes:
        main: The step batch's examples of the set that makes an epoch, on all processes.
        retain: The retain examples that `main` is paired with, on all processes.
        main_batches: This process's micro-batches of `main`, equally many on every process. An empty one means that
            this process has no work of its own and still takes part in the others' communication.
        retain_batches: This process's micro-batches of `retain`, likewise.
    """

    main: list[int]
    retain: list[int]
    main_batches: list[list[int]]
    retain_batches: list[list[int]]


class StepSampler(Sampler[StepPlan]):
    """The optimizer steps of one epoch: each main example once, paired with the next example of the retain stream.

    Item k of epoch e is element k of the main set's permutation of epoch e and element e * n_main + k of the retain
    stream, which is endless: it goes on across epochs, so every retain example is read before one is read again.
    """

    def __init__(
        self,
        main_lengths: Sequence[int],
        retain_lengths: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        step_batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Create the sampler.

        Args:
            main_lengths: Tokens of each example that makes an epoch (the forget set, or the retain set of a method
                without a forget set).
            retain_lengths: Tokens of each retain example; empty without retain examples.
            seed: Random seed of both orders.
            batch_size: Main examples per micro-batch, and as many retain examples.
            step_batch_size: Main examples per optimizer step, on all processes; the last step of an epoch may have
                fewer.
            rank: Index of this process.
            world: Number of processes.
        """
        self.main_lengths = main_lengths
        self.retain_lengths = retain_lengths
        self.seed = seed
        self.batch_size = batch_size
        self.step_batch_size = step_batch_size
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of optimizer steps per epoch."""
        return math.ceil(len(self.main_lengths) / self.step_batch_size)

    def __iter__(self) -> Iterator[StepPlan]:
        """Yield the epoch's optimizer steps."""
        main = _permutation(len(self.main_lengths), (self.seed, 0, self.epoch))
        retain = self._retain_stream(self.epoch * len(main), len(main)) if len(self.retain_lengths) else []
        for first in range(0, len(main), self.step_batch_size):
            ours = main[first : first + self.step_batch_size]
            theirs = retain[first : first + self.step_batch_size]
            yield StepPlan(
                main=ours,
                retain=theirs,
                main_batches=self._cut(ours, self.main_lengths),
                retain_batches=self._cut(theirs, self.retain_lengths),
            )

    def _retain_stream(self, first: int, count: int) -> list[int]:
        """Return elements first, first + 1, ... of the endless stream of the retain set's permutations."""
        size = len(self.retain_lengths)
        laps = range(first // size, (first + count - 1) // size + 1)
        stream = [index for lap in laps for index in _permutation(size, (self.seed, 1, lap))]
        start = first - laps[0] * size
        return stream[start : start + count]

    def _cut(self, indices: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """Return this process's micro-batches of a step batch, of examples of similar lengths, which saves padding."""
        if not indices:
            return []
        per_process = math.ceil(len(indices) / (self.batch_size * self.world))
        count = per_process * self.world
        if count > 1:
            indices = sorted(indices, key=lambda index: (lengths[index], index))
        cuts = [round(len(indices) * number / count) for number in range(count + 1)]
        batches = [indices[start:end] for start, end in zip(cuts[:-1], cuts[1:], strict=True)]
        return batches[self.rank :: self.world]


def _permutation(n: int, seed: tuple[int, int, int]) -> list[int]:
    return np.random.default_rng(seed).permutation(n).tolist()
