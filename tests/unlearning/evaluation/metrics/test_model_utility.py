"""Harmonic means against the standard library's."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearning.evaluation.metrics.model_utility import harmonic_mean


def of(*parts: float) -> float:
    return float(harmonic_mean(*(np.array([part]) for part in parts))[0])


@given(st.lists(st.floats(1e-6, 1), min_size=9, max_size=9))
def test_equals_the_standard_library(parts: list[float]) -> None:
    assert of(*parts) == pytest.approx(statistics.harmonic_mean(parts), rel=1e-12)


@given(st.floats(1e-6, 1))
def test_of_equal_parts_is_the_part(part: float) -> None:
    assert of(*[part] * 9) == pytest.approx(part, rel=1e-12)


def test_by_hand() -> None:
    assert of(1, 0.5, 0.25) == pytest.approx(3 / 7)
    assert of(1, 1, 1, 1, 1, 1, 1, 1, 0.1) == pytest.approx(0.5)  # one weak part of nine halves it


def test_one_zero_makes_it_zero_and_one_nan_makes_it_nan() -> None:
    assert of(*[0.9] * 8, 0.0) == 0
    assert of(*[0.9] * 8, 1e-320) == pytest.approx(0, abs=1e-300)  # 1 / x overflows
    assert np.isnan(of(*[0.9] * 8, np.nan))


def test_draws_are_apart() -> None:
    first, second = np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.25, 1.0])
    np.testing.assert_allclose(harmonic_mean(first, second), [1, 1 / 3, 0])
