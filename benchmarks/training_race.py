"""Ours and the straightforward trainer in turns in one process, on the same examples, agreeing on every loss."""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from benchmarks.gemm import synchronize
from benchmarks.measure import measure, rotated
from benchmarks.training_case import SEED, TrainingCase
from benchmarks.training_options import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Method
from benchmarks.training_plain import train_plain
from unlearning.common.errors import InputError
from unlearning.objectives.bilevel import combine

Side = Literal["ours", "plain"]
SIDES: tuple[Side, ...] = ("ours", "plain")

TOLERANCE = 1e-3
"""Of a loss, relative. Sums in another order differ by 1e-6; a wrong token, mask or normalisation by far more."""


@dataclass(eq=False)
class Entry:
    """One side's measurements for one method.

    Attributes:
        side: `ours`, or `plain` for the straightforward trainer.
        method: The method.
        losses: Loss of every step.
        memory_bytes: Peak memory above that before the first run, the model included; measured there because it takes
            time.
        seconds: Seconds of an optimizer step, mean over all but the first, in each later run.
        cpu_seconds: The same in the process's own time on all cores, which a busy machine hardly changes.
        setup_seconds: Seconds before the first step, in each later run: the model is built, and this toolkit computes
            constants.
    """

    side: Side
    method: Method
    losses: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    setup_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of an optimizer step: the median of the runs."""
        return statistics.median(self.seconds)

    @property
    def setup_median(self) -> float:
        """Seconds before the first step: the median of the runs."""
        return statistics.median(self.setup_seconds)


@dataclass(frozen=True, eq=False)
class Race:
    """The result of a race.

    Attributes:
        case: What was trained.
        entries: Both sides of every method.
        difference: Largest relative difference between the losses of the two sides.
        projection_seconds: Seconds of BLUR's combination of two gradients; None if it was not timed.
    """

    case: TrainingCase
    entries: tuple[Entry, ...]
    difference: float
    projection_seconds: float | None

    def entry(self, side: Side, method: str) -> Entry | None:
        """Return this side of this method, or None if it was not run."""
        return next((item for item in self.entries if (item.side, item.method.name) == (side, method)), None)

    def speedup(self, method: str) -> float:
        """Return the straightforward trainer's time as a multiple of this toolkit's."""
        ours, plain = self.entry("ours", method), self.entry("plain", method)
        assert ours and plain
        return plain.median / ours.median

    def cpu_speedup(self, method: str) -> float | None:
        """Return the same ratio for the time that the process spent on its cores; None on a GPU."""
        ours, plain = self.entry("ours", method), self.entry("plain", method)
        assert ours and plain
        if self.case.device.type != "cpu":
            return None
        return statistics.median(plain.cpu_seconds) / statistics.median(ours.cpu_seconds)

    def memory_ratio(self, method: str) -> float | None:
        """Our peak memory as a multiple of plain fine-tuning's; None where that was not run."""
        ours, plain = self.entry("ours", method), self.entry("plain", "finetune")
        return ours.memory_bytes / plain.memory_bytes if ours and plain else None

    def bilevel_ratio(self) -> float | None:
        """BLUR's step as a multiple of GradDiff's plus the projection; None where either was not run."""
        blur, grad_diff = self.entry("ours", "blur"), self.entry("ours", "grad_diff")
        if not blur or not grad_diff or self.projection_seconds is None:
            return None
        return blur.median / (grad_diff.median + self.projection_seconds)


def race(
    case: TrainingCase, methods: Sequence[Method], *, repeats: int, advance: Callable[[], None] = lambda: None
) -> Race:
    """Run each method once to measure its memory, compare the losses, then time the methods in turns.

    Args:
        case: Model, data and number of steps.
        methods: What to train.
        repeats: Timed rounds, each in another order.
        advance: Called after every run.

    Returns:
        Times, memory and losses of both sides of every method.

    Raises:
        InputError: The two sides of a method differ in a loss.
    """
    entries = [Entry(side, method) for method in methods for side in SIDES]
    # What is imported on first use, and the buffers that a library of matrix products keeps for a vocabulary of this
    # size (66 MiB for the shape wide), are not the first one's memory.
    rehearsal = TrainingCase(case.shape, 2, case.device)
    for entry in entries[:2]:
        _losses(entry, rehearsal)
    for entry in entries:
        found = measure(lambda entry=entry: _losses(entry, case), case.device)  # type: ignore[misc]
        entry.losses, entry.memory_bytes = found.value, found.memory_bytes
        advance()
    difference = max(_compare(ours, plain) for ours, plain in zip(entries[::2], entries[1::2], strict=True))
    for round_number in range(repeats):
        for entry in rotated(entries, round_number):
            with step_times(case.device) as stamps:
                gc.collect()
                start = time.perf_counter()
                _losses(entry, case)
            first, last = stamps[0], stamps[-1]
            entry.seconds.append((last.wall - first.wall) / (len(stamps) - 1))
            entry.cpu_seconds.append((last.cpu - first.cpu) / (len(stamps) - 1))
            entry.setup_seconds.append(max(0.0, first.wall - start - entry.seconds[-1]))
            advance()
    timed = projection_seconds(case) if any(method.bilevel for method in methods) else None
    return Race(case, tuple(entries), difference, timed)


@dataclass(frozen=True)
class Stamp:
    """A moment, in seconds of `time.perf_counter` and of `time.process_time`."""

    wall: float
    cpu: float


@contextmanager
def step_times(device: torch.device) -> Iterator[list[Stamp]]:
    """Yield a list that gets the time at which each optimizer step within the context ends."""
    stamps: list[Stamp] = []

    def stamp(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        synchronize(device)
        stamps.append(Stamp(time.perf_counter(), time.process_time()))

    handle = register_optimizer_step_post_hook(stamp)
    try:
        yield stamps
    finally:
        handle.remove()


def train_ours(case: TrainingCase, method: Method) -> list[float]:
    """Train with the toolkit, without any cached constants, and return the loss of every step."""
    from unlearning import train

    own: dict[str, Any] = dict(method.options)
    with _fresh_cache():
        result = train(
            method.toolkit,
            model=case.build_model(),
            tokenizer=case.tokenizer,
            forget=[row.example for row in case.forget] if method.uses_forget else None,
            retain=[row.example for row in case.retain],
            progress=False,
            max_steps=case.steps,
            batch_size=case.shape.batch,
            gradient_accumulation_steps=case.shape.accumulation,
            learning_rate=LEARNING_RATE,
            lr_schedule="constant",
            warmup_ratio=0,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            seed=SEED,
            device=case.device.type,
            logging_steps=1,
            **own,
        )
    return [line["loss"] for line in result.history]


@torch.no_grad()
def projection_seconds(case: TrainingCase) -> float:
    """BLUR's combination of two gradients of the model's size: median of three."""
    named = dict(case.build_model().named_parameters())
    forget, retain = ([torch.randn_like(weight) for weight in named.values()] for _ in range(2))
    seconds = []
    for _ in range(4):
        synchronize(case.device)
        start = time.perf_counter()
        combine(forget, retain, names=list(named))
        synchronize(case.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def as_record(found: Race) -> dict[str, Any]:
    """Return all numbers, for a file."""
    methods = list(dict.fromkeys(entry.method.name for entry in found.entries))
    return {
        "case": found.case.shape.description,
        "steps": found.case.steps,
        "max_relative_loss_difference": found.difference,
        "projection_seconds": found.projection_seconds,
        "blur_over_grad_diff_plus_projection": found.bilevel_ratio(),
        "methods": {
            name: {
                "speedup": found.speedup(name),
                "cpu_speedup": found.cpu_speedup(name),
                "memory_over_plain_finetune": found.memory_ratio(name),
                **{entry.side: _entry_record(entry) for entry in found.entries if entry.method.name == name},
            }
            for name in methods
        },
    }


def _entry_record(entry: Entry) -> dict[str, Any]:
    return {
        "seconds_per_step": entry.median,
        "all_seconds_per_step": entry.seconds,
        "all_cpu_seconds_per_step": entry.cpu_seconds,
        "setup_seconds": entry.setup_median,
        "peak_memory_bytes": entry.memory_bytes,
        "losses": entry.losses,
    }


def _losses(entry: Entry, case: TrainingCase) -> list[float]:
    return (train_ours if entry.side == "ours" else train_plain)(case, entry.method)


def _compare(ours: Entry, plain: Entry) -> float:
    """Return the largest relative difference between two lists of losses."""
    gaps = [abs(one - other) / max(1.0, abs(other)) for one, other in zip(ours.losses, plain.losses, strict=True)]
    for step, gap in enumerate(gaps, start=1):
        if not gap < TOLERANCE:
            raise InputError(
                f"{ours.method.name}: ours and the straightforward trainer differ by {gap:.1e} in the loss of step "
                f"{step}; nothing is reported"
            )
    return max(gaps)


@contextmanager
def _fresh_cache() -> Iterator[None]:
    before = os.environ.get("UNLEARNING_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNLEARNING_CACHE"] = str(Path(folder))
        try:
            yield
        finally:
            if before is None:
                del os.environ["UNLEARNING_CACHE"]
            else:
                os.environ["UNLEARNING_CACHE"] = before
