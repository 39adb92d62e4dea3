"""Means, ratios and their bootstrap intervals against numpy, slow resampling, and samples of known truth."""

import math

import numpy as np
import pytest

from unlearning.common.bootstrap import Bootstrap, Estimate, widening

GROUPS = ["a", "a", "a", "b", "c", "c", "d", "d", "d", "d"]


def values(seed: int, n: int = len(GROUPS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, n)


def slow_bootstrap(
    groups: list[str], top: np.ndarray, bottom: np.ndarray, *, draws: int, seed: int, equal_groups: bool = False
) -> tuple[float, float]:
    """Write every resample out as a list of examples, from the same multinomial draws over sorted groups."""
    names = sorted(set(groups))
    counts = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    kept = [not (math.isnan(a) or math.isnan(b)) for a, b in zip(top, bottom, strict=True)]
    drawn = []
    for count in counts:
        tops, bottoms = [], []
        for name, times in zip(names, count, strict=True):
            members = [i for i, group in enumerate(groups) if group == name and kept[i]]
            for _ in range(times):
                if equal_groups and members:
                    tops.append(np.mean(top[members]))
                    bottoms.append(np.mean(bottom[members]))
                elif not equal_groups:
                    tops.extend(top[members])
                    bottoms.extend(bottom[members])
        drawn.append(sum(tops) / sum(bottoms) if tops else math.nan)
    return tuple(np.nanquantile(drawn, [0.025, 0.975]))  # type: ignore[return-value]


def assert_estimate(ours: Estimate, value: float, interval: tuple[float, float]) -> None:
    assert math.isclose(ours.value, value, rel_tol=1e-12)
    np.testing.assert_allclose([ours.low, ours.high], interval, rtol=1e-9)


@pytest.mark.parametrize("equal_groups", [False, True])
@pytest.mark.parametrize("gap", [False, True])
def test_interval_of_a_mean_equals_slow_resampling(equal_groups: bool, gap: bool) -> None:
    x = values(0)
    if gap:
        x[[1, 3]] = np.nan  # b has no number left
    ours = Bootstrap(GROUPS, draws=400, seed=3, equal_groups=equal_groups).mean(x)
    ones = np.ones_like(x)
    interval = slow_bootstrap(GROUPS, x, ones, draws=400, seed=3, equal_groups=equal_groups)
    kept = {name: [v for v, g in zip(x, GROUPS, strict=True) if g == name and not np.isnan(v)] for name in "abcd"}
    means = [np.mean(part) for part in kept.values() if part]
    assert_estimate(ours, float(np.mean(means) if equal_groups else np.nanmean(x)), interval)
    assert ours.n == (8 if gap else 10)


@pytest.mark.parametrize("equal_groups", [False, True])
def test_interval_of_a_ratio_equals_slow_resampling(equal_groups: bool) -> None:
    top, bottom = values(1), np.abs(values(2)) + 0.5
    top[4], bottom[7] = np.nan, np.nan
    ours = Bootstrap(GROUPS, draws=400, seed=4, equal_groups=equal_groups).ratio(top, bottom)
    interval = slow_bootstrap(GROUPS, top, bottom, draws=400, seed=4, equal_groups=equal_groups)
    kept = np.array([i for i in range(10) if i not in (4, 7)])
    if equal_groups:
        parts = [[i for i in kept if GROUPS[i] == name] for name in "abcd"]
        expected = sum(top[part].mean() for part in parts) / sum(bottom[part].mean() for part in parts)
    else:
        expected = top[kept].mean() / bottom[kept].mean()
    assert_estimate(ours, float(expected), interval)
    assert ours.n == 8


def test_examples_without_groups_stand_alone() -> None:
    x = values(5, 30)
    ours = Bootstrap([""] * 30, draws=400, seed=1).mean(x)
    alone = Bootstrap([f"{i:02d}" for i in range(30)], draws=400, seed=1).mean(x)
    one_group = Bootstrap(["all"] * 30, draws=400, seed=1).mean(x)
    assert ours.value == alone.value == one_group.value
    spread = x.std() / math.sqrt(30)
    for estimate in (ours, alone, one_group):
        assert math.isclose(estimate.high - estimate.low, 2 * 1.96 * spread, rel_tol=0.15)


def test_whole_groups_are_drawn_so_copies_of_an_example_add_no_certainty() -> None:
    x = values(6, 20)
    single = Bootstrap([f"{i:02d}" for i in range(20)], draws=400, seed=2).mean(x)
    copied = Bootstrap([f"{i // 5:02d}" for i in range(100)], draws=400, seed=2).mean(np.repeat(x, 5))
    assert_estimate(copied, single.value, (single.low, single.high))
    naive = Bootstrap([""] * 100, draws=400, seed=2).mean(np.repeat(x, 5))
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)


def test_interval_of_a_paired_difference_is_that_of_the_differences() -> None:
    """Two curves that move together example by example differ with certainty, however wide each one is."""
    bootstrap = Bootstrap(GROUPS, seed=0)
    x = values(7)
    gap = bootstrap.mean((x + 0.25) - x)
    assert math.isclose(gap.low, 0.25, abs_tol=1e-12) and math.isclose(gap.high, 0.25, abs_tol=1e-12)
    assert bootstrap.mean(x).high - bootstrap.mean(x).low > 0.5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    x = values(8, 25)
    first, again, other = (Bootstrap([""] * 25, seed=seed).mean(x) for seed in (0, 0, 1))
    assert first == again
    assert first.value == other.value and (first.low, first.high) != (other.low, other.high)


def test_where_there_is_nothing_to_draw_from_there_is_no_interval() -> None:
    bootstrap = Bootstrap(GROUPS)
    nothing = bootstrap.mean(np.full(10, np.nan))
    assert nothing.n == 0 and all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))
    x = np.full(10, np.nan)
    x[:3] = [1.0, 2.0, 6.0]
    one_group = bootstrap.mean(x)
    assert one_group.value == 3.0 and one_group.n == 3
    assert math.isnan(one_group.low) and math.isnan(one_group.high)
    lonely = Bootstrap(["a"]).mean(np.array([0.5]))
    assert lonely.value == 0.5 and math.isnan(lonely.low)


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_hold_the_truth_about_as_often_as_they_say(clustered: bool) -> None:
    generator = np.random.default_rng(0)
    n_groups, size = 40, 3 if clustered else 1
    groups = [f"{i // size:03d}" for i in range(n_groups * size)]
    bootstrap = Bootstrap(groups, seed=0)
    hits = 0
    for _ in range(1000):
        shared = np.repeat(generator.normal(0.0, 1.0, n_groups), size)
        estimate = bootstrap.mean(shared + generator.normal(0.0, 0.3, n_groups * size))
        hits += estimate.low <= 0 <= estimate.high
    assert 0.92 <= hits / 1000 <= 0.97


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_widened_percentiles_of_few_clusters_hold_the_truth_about_as_often_as_they_say(n: int) -> None:
    generator = np.random.default_rng(0)
    bootstrap = Bootstrap([""] * n, seed=0)
    narrow = wide = 0
    for _ in range(1000):
        found = bootstrap.mean(generator.normal(0.0, 1.0, n))
        low, high = (found.value + widening(n) * (end - found.value) for end in (found.low, found.high))
        narrow += found.low <= 0 <= found.high
        wide += low <= 0 <= high
    assert narrow / 1000 < 0.93 <= wide / 1000 <= 0.985


def test_many_clusters_need_no_widening() -> None:
    assert widening(2) == pytest.approx(math.sqrt(2) * 12.706 / 1.960, rel=1e-3)
    assert widening(10_000) == pytest.approx(1.0, abs=3e-4)
