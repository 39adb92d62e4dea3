"""The Kolmogorov-Smirnov test against all permutations, scipy, and the published floors."""

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from unlearning.evaluation.benchmarks.tofu.summary import shown_floor
from unlearning.evaluation.metrics.forget_quality import compare, log10_floor, statistic

VALUES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)  # many ties
PUBLISHED = [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)]


def slow_distances(model: list[float], retain: list[float]) -> tuple[float, float]:
    """Largest excess of the model's distribution function, and of the control's."""
    gaps = [
        sum(value <= at for value in model) / len(model) - sum(value <= at for value in retain) / len(retain)
        for at in (*model, *retain)
    ]
    return max(max(gaps), 0), max(-min(gaps), 0)


@pytest.mark.parametrize(("n", "published"), PUBLISHED)
def test_complete_separation_has_the_published_p_value(n: int, published: float) -> None:
    lower, upper = np.linspace(-9, -1, n), np.linspace(1, 9, n)
    found = compare(lower, upper)
    assert found.statistic == 1
    assert found.p_value == pytest.approx(published, rel=1e-2)
    exact = 2 / math.comb(2 * n, n)
    assert found.p_value == pytest.approx(exact, rel=1e-9)
    assert 10 ** log10_floor(n, n) == pytest.approx(exact, rel=1e-9)
    assert shown_floor(n, n) == f"{exact:.2e}"
    assert found.log10_floor == log10_floor(n, n)


def test_floors_of_unequal_and_of_large_samples() -> None:
    assert 10 ** log10_floor(3, 5) == pytest.approx(2 / 56)
    assert 10 ** log10_floor(1, 1) == 1
    assert shown_floor(3600, 3600) == "8.16e-2166"  # 2 / C(7200, 3600), which is no float


def test_p_value_is_the_share_of_all_splits_that_are_as_far_apart() -> None:
    model, retain = [0.1, 0.4, 0.5, 2.0], [0.3, 3.0, 4.0, 5.0, 6.0]
    pool = model + retain
    ours = max(slow_distances(model, retain))
    splits = list(combinations(range(len(pool)), len(model)))
    as_far = 0
    for chosen in splits:
        rest = [value for place, value in enumerate(pool) if place not in chosen]
        as_far += max(slow_distances([pool[place] for place in chosen], rest)) >= ours - 1e-12
    assert compare(np.array(model), np.array(retain)).p_value == pytest.approx(as_far / len(splits), rel=1e-12)


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_distances_equal_the_definition_and_scipy(model: list[float], retain: list[float]) -> None:
    found = compare(np.array(model), np.array(retain))
    assert (found.model_smaller, found.model_larger) == pytest.approx(slow_distances(model, retain), abs=1e-12)
    assert found.statistic == pytest.approx(ks_2samp(model, retain).statistic, abs=1e-12)


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_swapping_the_models_turns_the_direction_around(model: list[float], retain: list[float]) -> None:
    there, back = compare(np.array(model), np.array(retain)), compare(np.array(retain), np.array(model))
    assert there.direction == -back.direction
    assert there.statistic == back.statistic
    assert there.p_value == pytest.approx(back.p_value, rel=1e-9)


def test_direction_says_whose_values_are_larger() -> None:
    small, large = np.array([0.0, 1.0, 2.0]), np.array([1.5, 2.5, 3.5])
    assert compare(small, large).direction == -1
    assert compare(large, small).direction == 1
    assert compare(small, small).direction == 0


def test_the_same_values_have_quality_one_in_any_order() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = compare(values, values[::-1])
    assert (found.p_value, found.statistic) == (1, 0)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=10))
def test_weights_are_repeated_rows(rows: list[tuple[int, int, int]]) -> None:
    if not any(times for *_, times in rows):
        return
    model, retain, times = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    weights = np.stack([times, np.ones_like(times)])
    drawn = statistic(weights, weights, model, retain)
    repeats = times.astype(int)
    assert drawn[0] == pytest.approx(compare(np.repeat(model, repeats), np.repeat(retain, repeats)).statistic)
    assert drawn[1] == pytest.approx(compare(model, retain).statistic)


def test_a_p_value_that_scipy_rounds_to_above_one_is_one_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(np.arange(5.0), np.arange(5.0) + 0.5).p_value == 1


def test_a_collapsed_model_is_told_apart_by_log_ratios_that_underflow_as_ratios() -> None:
    collapsed = np.linspace(-1e4, -9e3, 40)  # as ratios all are 0, in ties
    assert compare(collapsed, np.linspace(-2, 2, 40)).statistic == 1
    assert compare(collapsed, collapsed + 2e3).statistic == 1
