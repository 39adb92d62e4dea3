"""The spread between training runs: simulated runs of known spread, and what more controls leave of it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from dissect.stress.core.result import Residual
from dissect.verdicts.spread import PRIOR_DF, RunSpread, run_spread

ONE = Residual(0.0, -0.1, 0.1, 10, "", "control", draws=np.zeros(4000), n_controls=1)


def of(n_controls, variance):
    return replace(ONE, n_controls=n_controls, run_variance=variance)


def test_one_control_borrows_the_rules_spread():
    found = run_spread([ONE, ONE], 0.06)
    assert found == RunSpread(0.06, PRIOR_DF, 1) and found.is_borrowed
    assert run_spread([replace(ONE, n_controls=0)], 0.06) == RunSpread(0.06, PRIOR_DF, 0)
    assert run_spread([], 0.06).n_controls == 0


def test_controls_that_differ_as_the_rules_models_do_leave_less():
    """Of a difference of two runs, the mean of infinitely many controls leaves the variance of one."""
    for k in (2, 3, 1000):
        found = run_spread([of(k, 0.06**2 / 2)], 0.06)
        assert found.sd == pytest.approx(0.06 * np.sqrt((1 + 1 / k) / 2)) and not found.is_borrowed
        assert found.df == PRIOR_DF + k - 1


def test_entries_are_pooled_and_a_negative_estimate_is_zero():
    pooled = run_spread([of(3, 0.01), of(3, 0.03), of(3, None)], 0.06)
    assert pooled == run_spread([of(3, 0.02)], 0.06)
    assert run_spread([of(3, -0.02)], 0.06) == run_spread([of(3, 0.0)], 0.06)
    wanted = PRIOR_DF * 0.06**2 / 2 / (PRIOR_DF + 2) * (4 / 3)
    assert run_spread([of(3, 0.0)], 0.06).sd == pytest.approx(np.sqrt(wanted))


@given(st.floats(0, 0.1), st.floats(0, 0.1), st.integers(2, 6))
def test_controls_that_differ_more_never_narrow(first, second, k):
    low, high = sorted((first, second))
    assert run_spread([of(k, low)], 0.05).sd <= run_spread([of(k, high)], 0.05).sd


def test_deviates_are_students_t():
    spread = RunSpread(0.05, 9, 2)
    drawn = spread.deviates(2000)
    assert np.quantile(drawn, 0.975) == pytest.approx(0.05 * t.ppf(0.975, 9), rel=0.01)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.1
    low, high = spread.interval(ONE)
    assert (low, high) == pytest.approx((-0.05 * t.ppf(0.975, 9), 0.05 * t.ppf(0.975, 9)), rel=0.01)
    assert spread.interval(replace(ONE, low=None)) is None and spread.interval(replace(ONE, draws=None)) is None


def test_a_run_without_the_knowledge_lies_in_the_interval_as_often_as_it_should():
    """Simulated: run_sd as the rule's, controls and model from the same law; 95 % of the differences are inside."""
    rng = np.random.default_rng(0)
    for k in (1, 2, 4):
        inside = []
        for _ in range(400):
            # The borrowed value is itself an estimate with PRIOR_DF degrees of freedom.
            run_sd = np.sqrt(2 * 0.05**2 * rng.chisquare(PRIOR_DF) / PRIOR_DF)
            controls = rng.normal(0, 0.05, k)
            spread = run_spread([of(k, controls.var(ddof=1) if k > 1 else None)], run_sd)
            inside.append(abs(rng.normal(0, 0.05) - controls.mean()) < spread.sd * t.ppf(0.975, spread.df))
        assert np.mean(inside) == pytest.approx(0.95, abs=0.035)
