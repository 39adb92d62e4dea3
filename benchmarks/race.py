"""Contestants side by side in one process: the same sweep, interleaved, agreeing on every number."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.contestants import OURS, Contestant, Krs, Run
from benchmarks.gemm import GemmProbe, best_around
from benchmarks.measure import measure, rotated, timed
from unlearning.common.errors import InputError

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far two contestants' KRS may be apart. Half precision rounds every activation, each in its own order: in bfloat16
small random models were 0.005 apart, and 0.007 from float32."""


@dataclass(eq=False)
class Entry:
    """One contestant's measurements.

    Attributes:
        contestant: The contestant.
        run: Its sweep.
        flops: Operations of the whole sweep as the contestant runs it.
        krs: Its KRS.
        warm_up: Seconds of its first sweep; this toolkit's includes the calibration of the chunk size.
        memory_bytes: Peak memory above that before the first sweep; measured there because it takes time.
        times: Seconds of each later sweep.
        peaks: The machine's best rate around each of these, in FLOP/s: it drifts by several percent within minutes.
    """

    contestant: Contestant
    run: Run
    flops: int
    krs: Krs = field(default_factory=lambda: torch.empty(0))
    warm_up: float = 0.0
    memory_bytes: int = 0
    times: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median wall time of a sweep."""
        return statistics.median(self.times)

    @property
    def gemm_share(self) -> float:
        """Rate of its own operations as a share of the best matrix product's around it; median over its sweeps."""
        return statistics.median(
            self.flops / seconds / peak for seconds, peak in zip(self.times, self.peaks, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Race:
    """The result of a race.

    Attributes:
        case: What was swept.
        entries: The contestants, this toolkit's first.
        gemm: The machine's rates, measured between the sweeps.
        difference: Largest difference between the KRS of two contestants.
        apart: Names of these two contestants.
    """

    case: Case
    entries: tuple[Entry, ...]
    gemm: GemmProbe
    difference: float
    apart: tuple[str, str]

    def ratio(self, entry: Entry) -> float:
        """Return a contestant's time as a multiple of this toolkit's."""
        return entry.seconds / self.entries[0].seconds


def race(
    case: Case,
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    gemm: GemmProbe,
    advance: Callable[[], None] = lambda: None,
) -> Race:
    """Run each sweep once to warm up, compare the numbers, then time the sweeps in turns.

    Every round has another order, so that no sweep always meets the machine in the same state. Matrix products are
    timed before and after every sweep.

    Args:
        case: What to sweep.
        contestants: The contestants, this toolkit's first.
        repeats: Timed rounds.
        gemm: Measures the machine's peak rate.
        advance: Called after every sweep.

    Returns:
        Times, memory and rates of every contestant, and the largest difference between their KRS.

    Raises:
        InputError: Two contestants differ in a KRS by more than the dtype explains.
    """
    entries = [_enter(case, contestant) for contestant in contestants]
    for entry in entries:
        first = measure(partial(entry.run, case.batches), case.pair.base.device)
        entry.warm_up, entry.memory_bytes, entry.krs = first.seconds, first.memory_bytes, first.value
        advance()
    dtype = next(case.pair.base.hf.parameters()).dtype
    difference, apart = compare(entries)
    _check(difference, apart, TOLERANCE[dtype])
    before = gemm.measure()
    for round_number in range(repeats):
        for entry in rotated(entries, round_number):
            krs, seconds = timed(partial(entry.run, case.batches), case.pair.base.device)
            after = gemm.measure()
            entry.times.append(seconds)
            entry.peaks.append(best_around(before, after))
            before = after
            _check(_gap(krs, entry.krs), (entry.contestant.name,) * 2, TOLERANCE[dtype])
            advance()
    return Race(case, tuple(entries), gemm, difference, apart)


def compare(entries: Sequence[Entry]) -> tuple[float, tuple[str, str]]:
    """Return the largest difference between the KRS of two contestants, and their names."""
    gaps = {
        (one.contestant.name, other.contestant.name): _gap(one.krs, other.krs)
        for one, other in combinations(entries, 2)
    }
    if not gaps:
        return 0.0, (entries[0].contestant.name,) * 2
    apart = max(gaps, key=gaps.__getitem__)
    return gaps[apart], apart


def _enter(case: Case, contestant: Contestant) -> Entry:
    run = contestant.load()(case.pair, case.interventions)
    return Entry(contestant, run, flops=_flops(case, contestant))


def _flops(case: Case, contestant: Contestant) -> int:
    if contestant.name != OURS:
        return case.naive_flops
    from benchmarks.contestants.wavefront import planned_flops

    return planned_flops(case)


def _gap(ours: Krs, theirs: Krs) -> float:
    """Return the largest difference; infinite where only one of the two is defined."""
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    return float((ours - theirs).nan_to_num(0.0).abs().max())


def _check(difference: float, apart: tuple[str, str], tolerance: float) -> None:
    if difference > tolerance:
        one, other = apart
        what = f"{one} and {other} differ" if one != other else f"two sweeps of {one} differ"
        raise InputError(
            f"{what} by {difference:.2g} in a KRS, more than {tolerance:g}: a fast wrong number is worth nothing, so "
            "nothing is reported; compare both with the reference engine"
        )


def as_record(result: Race) -> dict[str, Any]:
    """Return what `--json` writes, in seconds, bytes and operations."""
    case = result.case
    return {
        "case": case.description,
        "interventions": len(case.interventions),
        "examples": sum(len(batch.examples) for batch in case.batches),
        "gemm": {
            "peak_flops_per_second": result.gemm.peak,
            "best_product": result.gemm.best,
            "rates": [
                {"inputs": n_in, "outputs": n_out, "tokens": tokens, "flops_per_second": rate}
                for (n_in, n_out, tokens), rate in result.gemm.rates.items()
            ],
        },
        "naive_flops": case.naive_flops,
        "agreement": {"max_krs_difference": result.difference, "between": list(result.apart)},
        "contestants": {
            entry.contestant.name: {
                "seconds": entry.seconds,
                "all_seconds": entry.times,
                "warm_up_seconds": entry.warm_up,
                "ratio_to_ours": result.ratio(entry),
                "flops": entry.flops,
                "gemm_peaks_around": entry.peaks,
                "gemm_share": entry.gemm_share,
                "peak_memory_bytes_above_start": entry.memory_bytes,
            }
            for entry in result.entries
        },
    }
