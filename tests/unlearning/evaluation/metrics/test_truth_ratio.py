"""Truth ratios against fifty-digit arithmetic, and rows whose values are known."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.evaluation.metrics.truth_ratio import (
    forget_truth_ratio,
    knowledge_truth_ratio,
    log_truth_ratio,
    log_truth_ratio_arithmetic,
    utility_truth_ratio,
)

LOSS = st.floats(0, 1e4)
WRONG = st.lists(LOSS, min_size=1, max_size=5)


def slow_ratio(correct: float, wrong: list[float], *, arithmetic: bool) -> Decimal:
    """R from probabilities themselves."""
    p = [(-Decimal(loss)).exp() for loss in wrong]
    mean = sum(p) / len(p) if arithmetic else (-sum(map(Decimal, wrong)) / len(wrong)).exp()
    return mean / (-Decimal(correct)).exp()


@settings(max_examples=50)
@given(LOSS, WRONG)
def test_all_forms_equal_decimal_arithmetic_even_where_probabilities_underflow(
    correct: float, wrong: list[float]
) -> None:
    forms = ((log_truth_ratio, False), (log_truth_ratio_arithmetic, True))
    for function, arithmetic in forms:
        log_ratio = function(correct, np.array(wrong))
        with localcontext(prec=50):
            ratio = slow_ratio(correct, wrong, arithmetic=arithmetic)
            assert log_ratio == pytest.approx(float(ratio.ln()), rel=1e-9, abs=1e-9)
            expected = [min(ratio, 1 / ratio), max(Decimal(0), 1 - ratio), 1 / (1 + ratio)]
        values = [f(np.array([log_ratio]))[0] for f in (forget_truth_ratio, utility_truth_ratio, knowledge_truth_ratio)]
        assert values == pytest.approx([float(value) for value in expected], rel=1e-7, abs=1e-9)


@settings(max_examples=50)
@given(LOSS, WRONG)
def test_the_arithmetic_mean_is_never_below_the_geometric(correct: float, wrong: list[float]) -> None:
    arithmetic = log_truth_ratio_arithmetic(correct, np.array(wrong))
    assert arithmetic >= log_truth_ratio(correct, np.array(wrong)) - 1e-9


def test_one_wrong_answer_makes_both_forms_one() -> None:
    assert log_truth_ratio(1.5, np.array([2.0])) == pytest.approx(-0.5)
    assert log_truth_ratio_arithmetic(1.5, np.array([2.0])) == pytest.approx(-0.5)


def test_rows_by_hand() -> None:
    # p_c = 1/2; wrong ones 1/4 and 1/16: geometric mean 1/8, arithmetic mean 5/32.
    correct, wrong = np.log(2), np.log([4.0, 16.0])
    assert np.exp(log_truth_ratio(correct, wrong)) == pytest.approx(1 / 4)
    assert np.exp(log_truth_ratio_arithmetic(correct, wrong)) == pytest.approx(5 / 16)
    log_ratio = np.log(np.array([1 / 4, 1.0, 4.0]))
    np.testing.assert_allclose(forget_truth_ratio(log_ratio), [1 / 4, 1, 1 / 4])
    np.testing.assert_allclose(utility_truth_ratio(log_ratio), [3 / 4, 0, 0], atol=1e-15)
    np.testing.assert_allclose(knowledge_truth_ratio(log_ratio), [4 / 5, 1 / 2, 1 / 5])


def test_a_tie_is_exactly_one() -> None:
    log_ratio = np.array([log_truth_ratio(2.5, np.array([2.5, 2.5, 2.5]))])
    assert forget_truth_ratio(log_ratio)[0] == 1
    assert utility_truth_ratio(log_ratio)[0] == 0
    assert knowledge_truth_ratio(log_ratio)[0] == 0.5


def test_a_collapsed_model_has_finite_values_that_stay_apart() -> None:
    log_ratio = np.array([log_truth_ratio(1e4, np.array([9.9e3])), log_truth_ratio(1e4, np.array([9.8e3])), -1e4, 1e4])
    np.testing.assert_allclose(forget_truth_ratio(log_ratio), [np.exp(-100), np.exp(-200), 0, 0], rtol=1e-12)
    np.testing.assert_array_equal(utility_truth_ratio(log_ratio), [0, 0, 1, 0])
    np.testing.assert_allclose(knowledge_truth_ratio(log_ratio), [np.exp(-100), np.exp(-200), 1, 0], rtol=1e-12)
