"""Probabilities against fifty-digit arithmetic."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.evaluation.metrics.probability import normalised_probability, probability

LOSSES = st.floats(0, 1e4)


def slow_normalised(correct: float, wrong: list[float]) -> float:
    with localcontext(prec=50):
        p = [(-Decimal(loss)).exp() for loss in (correct, *wrong)]
        return float(p[0] / sum(p))


def test_probability_of_known_losses() -> None:
    np.testing.assert_allclose(probability(np.array([0.0, np.log(2), np.log(8)])), [1, 0.5, 0.125], rtol=1e-15)
    assert probability(1e4) == 0  # 1e-4343 is no float


@settings(max_examples=50)
@given(LOSSES, st.lists(LOSSES, min_size=1, max_size=5))
def test_normalised_probability_equals_decimal_arithmetic(correct: float, wrong: list[float]) -> None:
    assert normalised_probability(correct, np.array(wrong)) == pytest.approx(slow_normalised(correct, wrong), rel=1e-9)


def test_normalised_probability_by_hand() -> None:
    log = np.log
    assert normalised_probability(-log(0.3), -log([0.2, 0.1])) == pytest.approx(0.5, rel=1e-14)
    assert normalised_probability(7.0, np.array([7.0, 7.0, 7.0])) == pytest.approx(0.25, rel=1e-14)  # ties


def test_normalised_probability_of_a_collapsed_model_is_that_of_the_same_differences() -> None:
    collapsed = normalised_probability(1e4, np.array([1e4 + 1, 1e4 + 2]))
    assert collapsed == pytest.approx(normalised_probability(0.0, np.array([1.0, 2.0])), rel=1e-12)
    assert normalised_probability(1e4, np.array([1.0])) == 0
    assert normalised_probability(1.0, np.array([1e4])) == 1
