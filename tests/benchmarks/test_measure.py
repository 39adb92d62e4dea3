"""Memory is that of the call alone; nobody always goes first; the peak is the best product."""

import os
import time

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.gemm import GemmProbe, best_around
from benchmarks.measure import measure, rotated

CPU = torch.device("cpu")
MIB = 2**20


def hold(mebibytes: int) -> int:
    """Touch that much memory and let go of it a while later."""
    held = torch.ones(mebibytes * MIB, dtype=torch.uint8)
    time.sleep(0.2)
    return held.numel()


def test_memory_is_counted_above_what_was_there_and_for_each_call_alone() -> None:
    kept = torch.ones(64 * MIB, dtype=torch.uint8)
    large = measure(lambda: hold(160), CPU)
    small = measure(lambda: hold(32), CPU)
    assert large.value == 160 * MIB and kept.numel() == 64 * MIB
    assert 150 * MIB < large.memory_bytes < 200 * MIB
    assert 28 * MIB < small.memory_bytes < 70 * MIB, "an earlier call's peak does not stay"
    assert large.seconds > 0.2


def test_an_exception_of_the_call_comes_through() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        measure(fail, CPU)


def test_every_contestant_starts_a_round_and_keeps_its_neighbours() -> None:
    rounds = [rotated("abc", turn) for turn in range(4)]
    assert ["".join(order) for order in rounds] == ["abc", "bca", "cab", "abc"]


def test_peak_is_the_best_median_rate_of_the_models_own_products() -> None:
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    gemm = GemmProbe(config, device=CPU, dtype=torch.float32, chunks=(4, 8))
    assert gemm.measure() == gemm.rates
    gemm.measure()
    shapes = {(32, 32), (32, 16), (32, 48), (48, 32), (32, 70)}
    assert set(gemm.rates) == {(*shape, tokens) for shape in shapes for tokens in (4, 8)}
    assert gemm.peak == max(gemm.rates.values())
    n_in, n_out, tokens = max(gemm.rates, key=gemm.rates.__getitem__)
    assert gemm.best == f"[{tokens} x {n_in}] by [{n_in} x {n_out}]"
    assert all(rate > 1e6 for rate in gemm.rates.values())


def test_the_best_rate_around_a_sweep_is_of_one_product() -> None:
    """And not of whichever was lucky in each round."""
    before, after = {(1, 1, 1): 10.0, (2, 2, 2): 4.0}, {(1, 1, 1): 2.0, (2, 2, 2): 9.0}
    assert best_around(before, after) == 6.5


def test_a_rate_is_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("benchmarks.gemm.time.perf_counter", lambda: float(next(ticks)))  # every timing takes 1 s
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=4)
    gemm = GemmProbe(config, device=CPU, dtype=torch.float32, chunks=(5,))
    gemm.measure()
    assert gemm.rates == {(32, 32, 5): 2 * 5 * 32 * 32}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps no peak to set back")
def test_memory_that_is_held_for_a_moment_is_counted() -> None:
    def for_a_moment() -> None:
        torch.ones(96 * MIB, dtype=torch.uint8)

    assert 90 * MIB < measure(for_a_moment, CPU).memory_bytes < 130 * MIB
