"""CPU seconds of a verdict, by test and by model."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks.measure import measure
from dissect.stress import catalogue
from dissect.stress.catalogue import Budget, Entry, Run
from dissect.stress.core.case import Case
from dissect.stress.core.result import StressResult

T = TypeVar("T")

REST = "everything else"
"""What a verdict does outside its tests: utility, the rule, and the models' preparation."""

ALL_MODELS = "all models"
"""The column of tests that compare models, and so cannot be run on one of them."""

_WIDTH, _ROWS, _TIMES = 128, 512, 150


@dataclass(frozen=True)
class Cost:
    """What one verdict took.

    Attributes:
        cpu_s: CPU seconds of the process, all threads together.
        wall_s: Wall time in seconds.
        peak_memory_bytes: Peak resident memory above that at the start.
        tests: CPU seconds by test; `REST` is what is outside the tests.
        yardstick_s: CPU seconds of `yardstick`, the mean of before and after.
    """

    cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    tests: dict[str, float]
    yardstick_s: float


def cost_of(call: Callable[[], Any]) -> Cost:
    """Call something that runs a verdict, and measure it.

    Args:
        call: Runs one verdict.

    Returns:
        Its cost.
    """
    spent: dict[str, float] = defaultdict(float)

    def clock(entry: Entry, run: Run) -> Run:
        def timed(case: Case) -> StressResult:
            found, seconds = on_the_cpu(lambda: run(case))
            spent[entry.name] += seconds
            return found

        return timed

    before = yardstick()
    with wrapped_tests(clock):
        whole = measure(lambda: on_the_cpu(call)[1], torch.device("cpu"))
    after = yardstick()
    tests = {**spent, REST: whole.value - sum(spent.values())}
    return Cost(whole.value, whole.seconds, whole.memory_bytes, tests, (before + after) / 2)


def split_by_model(call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Call something that runs a verdict, and run each of its tests on one model after the other.

    The sum over models is more than the test takes on all of them where it trains or scores several together.

    Args:
        call: Runs one verdict.

    Returns:
        CPU seconds by test and role; of a test that compares models, those of `ALL_MODELS`.
    """
    spent: dict[str, dict[str, float]] = {}

    def clock(entry: Entry, run: Run) -> Run:
        def timed(case: Case) -> StressResult:
            if entry.compares_models:
                found, spent_on_all = on_the_cpu(lambda: run(case))
                spent[entry.name] = {ALL_MODELS: spent_on_all}
                return found
            spent[entry.name] = {role: on_the_cpu(partial(run, replace(case, only=role)))[1] for role in case.models}
            return run(case)

        return timed

    with wrapped_tests(clock):
        call()
    return spent


@contextmanager
def wrapped_tests(wrap: Callable[[Entry, Run], Run]) -> Iterator[None]:
    """Let every test of the catalogue run inside a function of one's own.

    Args:
        wrap: Takes an entry and its run under one budget, and returns what is run in its place.

    Yields:
        Nothing; afterwards the catalogue is as it was.
    """
    entries = catalogue.entries

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Entry, ...]:
        return tuple(
            replace(entry, runs={budget: wrap(entry, run) for budget, run in entry.runs.items()})
            for entry in entries(*args, **kwargs)
        )

    with patch.object(catalogue, "entries", wrapped):
        yield


def on_the_cpu(call: Callable[[], T]) -> tuple[T, float]:
    """Call; returns the result and the CPU seconds of the process, all threads together."""
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


def yardstick() -> float:
    """Return the CPU seconds of a fixed piece of work: forward and backward passes of a small MLP.

    A verdict's seconds over these hardly depend on the machine, nor on what else keeps it busy.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_ROWS, _WIDTH, generator=generator)
    layers = [torch.nn.Linear(_WIDTH, 4 * _WIDTH), torch.nn.SiLU(), torch.nn.Linear(4 * _WIDTH, _WIDTH)]
    model = torch.nn.Sequential(*layers, *layers)
    model(inputs).square().mean().backward()  # not timed: the first call reserves memory

    def work() -> None:
        for _ in range(_TIMES):
            model(inputs).square().mean().backward()

    return on_the_cpu(work)[1]


def run_verdict(unlearned: str, budget: Budget, limit: int | None) -> Callable[[], Any]:
    """Load a built-in pair, and return the call that judges it.

    Args:
        unlearned: Name of a built-in unlearned model, such as `demo:npo`.
        budget: Budget of the verdict.
        limit: Maximum number of forget facts; None takes the budget's.

    Returns:
        A function that runs the verdict with the pair's own control and question sets.
    """
    from dissect import load_pair, load_prompts, verdict
    from dissect.zoo import question_set

    base = f"{unlearned.partition(':')[0]}:base"
    pair = load_pair(base, unlearned, device="cpu", progress=False)
    forget = load_prompts(question_set("forget"), pair.tokenizer)
    return lambda: verdict(pair, forget, budget=budget, limit=limit, progress=False)
