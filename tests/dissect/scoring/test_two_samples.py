"""Two sets against each other: by hand, by brute force, and intervals that cover."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.scoring.two_samples import Example, TwoSamples

SCORES = st.lists(st.integers(0, 4).map(float), min_size=2, max_size=12)


def singles(n: int, prefix: str = "") -> list[Example]:
    return [Example(f"{prefix}{index}" if prefix else "", "") for index in range(n)]


def independent(n: int, m: int, *, draws: int = 2000, seed: int = 0) -> TwoSamples:
    return TwoSamples(singles(n), singles(m), seed=seed, draws=draws)


def test_difference_ratio_and_delta_by_hand() -> None:
    samples = independent(3, 2)
    first, second = np.array([1.0, 2.0, 6.0]), np.array([2.0, 4.0])
    assert samples.difference(first, second).value == 0.0
    assert samples.ratio(first, second).value == 1.0
    # Of six comparisons: 1 < 2, 1 < 4, 2 = 2, 2 < 4, 6 > 2, 6 > 4.
    assert samples.cliffs_delta(first, second).value == pytest.approx((2 - 3) / 6, abs=1e-15)
    assert samples.difference(first, second).n == 5


@given(SCORES, SCORES)
def test_cliffs_delta_is_the_count_over_all_pairs(first: list[float], second: list[float]) -> None:
    expected = np.mean([np.sign(x - y) for x, y in itertools.product(first, second)])
    delta = independent(len(first), len(second), draws=20).cliffs_delta(np.array(first), np.array(second))
    assert delta.value == pytest.approx(expected, abs=1e-12)
    assert -1 <= delta.low <= delta.high <= 1


def test_equal_values_have_no_difference_and_no_dominance() -> None:
    samples = independent(5, 4)
    for estimate in (samples.difference(np.ones(5), np.ones(4)), samples.cliffs_delta(np.ones(5), np.ones(4))):
        assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_interval_of_independent_sets_is_welch_s() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.normal(1, 1, 400), generator.normal(0, 3, 300)
    estimate = independent(400, 300, draws=8000).difference(first, second)
    half = 1.96 * np.sqrt(first.var(ddof=1) / 400 + second.var(ddof=1) / 300)
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.05 * half)


def test_same_ids_are_paired_whatever_their_order() -> None:
    first = [Example(f"q{index}", "") for index in range(50)]
    order = np.random.default_rng(1).permutation(50)
    samples = TwoSamples(first, [first[index] for index in order], seed=0)
    assert samples.pairing == "ids"
    values = np.random.default_rng(2).normal(0, 10, 50)
    estimate = samples.difference(values + 1, values[order])
    # Every pair differs by exactly one, so that no draw can say anything else.
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1), abs=1e-12)
    assert estimate.n == 50


def test_pair_counts_only_where_both_values_are_numbers() -> None:
    examples = [Example(name, "") for name in "abc"]
    estimate = TwoSamples(examples, examples, seed=0).difference(np.array([1, np.nan, 5.0]), np.array([np.nan, 1, 3.0]))
    assert (estimate.value, estimate.n) == (2.0, 1)
    assert np.isnan(estimate.low)


def test_shared_groups_are_drawn_together() -> None:
    groups = [f"concept {index}" for index in range(30) for _ in range(2)]
    level = np.repeat(np.random.default_rng(4).normal(0, 10, 30), 2)
    samples = TwoSamples([Example("", g) for g in groups], [Example("", g) for g in groups[::-1]], seed=0)
    assert samples.pairing == "groups"
    estimate = samples.difference(level + 1, level[::-1])
    assert (estimate.low, estimate.high) == pytest.approx((1, 1), abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([Example("a", ""), Example("b", "")], [Example("a", ""), Example("c", "")]),
        ([Example("", "x"), Example("", "y")], [Example("", "x"), Example("", "z")]),
        ([Example("", "x"), Example("", "x")], [Example("", "x"), Example("", "x")]),  # one group is none
        ([Example("", ""), Example("", "")], [Example("", ""), Example("", "")]),
    ],
)
def test_sets_that_share_nothing_whole_are_drawn_each_by_itself(first: list[Example], second: list[Example]) -> None:
    assert TwoSamples(first, second, seed=0).pairing == "none"


def test_whole_groups_are_drawn_so_that_copies_add_no_certainty() -> None:
    generator = np.random.default_rng(5)
    values, other = generator.normal(0, 1, 20), generator.normal(0, 1, 20)
    few = TwoSamples([Example("", f"g{i}") for i in range(20)], singles(20), seed=0, draws=6000)
    many = TwoSamples([Example("", f"g{i}") for i in range(20) for _ in range(9)], singles(20), seed=0, draws=6000)
    alone, copied = few.difference(values, other), many.difference(np.repeat(values, 9), other)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_missing_values_on_one_side_give_no_estimate_and_a_lone_cluster_no_interval() -> None:
    samples = independent(2, 3)
    nothing = samples.difference(np.array([np.nan, np.nan]), np.ones(3))
    assert np.isnan(nothing.value)
    assert nothing.n == 0
    lone = samples.difference(np.array([np.nan, 2.0]), np.ones(3))
    assert lone.value == 1.0
    assert np.isnan(lone.low)


def test_ratio_to_nothing_is_no_number() -> None:
    assert np.isnan(independent(2, 2).ratio(np.ones(2), np.zeros(2)).value)


def test_seed_decides_the_draws() -> None:
    generator = np.random.default_rng(6)
    first, second = generator.normal(0, 1, 30), generator.normal(0, 1, 30)
    one, same, other = (independent(30, 30, seed=seed).difference(first, second) for seed in (0, 0, 1))
    assert one == same
    assert one.low != other.low
