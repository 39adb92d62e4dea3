"""The order of the examples: what an optimizer step reads, as a function of the seed and the step alone.

The same on any number of processes, resumed or not. A step batch is all that one optimizer step reads; it is cut into
micro-batches by length, which changes padding and no number, because losses are normalised by the whole step batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class StepPlan:
    """What one process reads in one optimizer step, as places in the data.

    Attributes:
        main, retain: all examples of the step batch, on all processes: what an epoch is made of, and what they are
            paired with.
        main_batches, retain_batches: this process's micro-batches of them, equally many on every process; an empty
            one stands for no work of its own (the process must still take part in the others').
    """

    main: list[int]
    retain: list[int]
    main_batches: list[list[int]]
    retain_batches: list[list[int]]


class StepSampler(Sampler[StepPlan]):
    """The optimizer steps of one epoch: each main example once, each paired with the next of the retain stream.

    Item k of epoch e is (permutation of the main set of epoch e)[k] and element e * n_main + k of the retain stream,
    which therefore goes on across epochs: every retain example is read before one is read again.

    Args:
        main_lengths: tokens of each example that makes an epoch (the forget set, or the retain set of a method that
            has no other).
        retain_lengths: tokens of each retain example; empty where there is nothing to pair.
        seed: of both orders.
        batch_size: main examples a micro-batch, and as many retain examples.
        step_batch_size: main examples an optimizer step, on all processes; the last step of an epoch may have fewer.
        rank, world: this process among how many.
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
        self.main_lengths = main_lengths
        self.retain_lengths = retain_lengths
        self.seed = seed
        self.batch_size = batch_size
        self.step_batch_size = step_batch_size
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.main_lengths) / self.step_batch_size)

    def __iter__(self) -> Iterator[StepPlan]:
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
        """Elements first, first + 1, ... of the endless stream of the retain set's permutations."""
        size = len(self.retain_lengths)
        laps = range(first // size, (first + count - 1) // size + 1)
        stream = [index for lap in laps for index in _permutation(size, (self.seed, 1, lap))]
        start = first - laps[0] * size
        return stream[start : start + count]

    def _cut(self, places: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """This process's share of a step batch: micro-batches of similar lengths, so that little is padding."""
        if not places:
            return []
        per_process = math.ceil(len(places) / (self.batch_size * self.world))
        count = per_process * self.world
        if count > 1:
            places = sorted(places, key=lambda place: (lengths[place], place))
        cuts = [round(len(places) * number / count) for number in range(count + 1)]
        batches = [places[start:end] for start, end in zip(cuts[:-1], cuts[1:], strict=True)]
        return batches[self.rank :: self.world]


def _permutation(n: int, seed: tuple[int, int, int]) -> list[int]:
    return np.random.default_rng(seed).permutation(n).tolist()
