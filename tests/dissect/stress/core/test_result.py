import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect.stress.core.result import StressResult, _run_variance, fact_rows, value_rows
from dissect.stress.core.scores import score_facts
from dissect.verdicts.spread import RunSpread
from tests.dissect.stress.constructed import case_of, model
from unlearning.common.bootstrap import widening

N = 24


@pytest.fixture(scope="module")
def facts():
    return case_of(model("demo:base"), n=N).forget


def _result(facts, values, *, measure="rank", floors=None, seed=0):
    """A result of made-up values by (role, variant)."""
    frame = value_rows(facts, ((role, variant, {measure: row}) for (role, variant), row in values.items()))
    return StressResult(
        test="made-up",
        level=3,
        measure=measure,
        frame=frame,
        proves="nothing",
        settings={},
        seconds=0.0,
        floors={"rank": 0.5} if floors is None else floors,
        seed=seed,
    )


def _noise(seed, n=N):
    return np.random.default_rng(seed).uniform(0.3, 0.7, n)


def test_without_a_value_of_any_fact_there_is_no_residual(facts):
    nothing = np.full(N, np.nan)
    roles = ("base", "unlearned", "control")
    found = _result(facts, {(role, variant): nothing for role in roles for variant in ("", "attack")})
    assert found.residual().rho is None and found.residual().reason == "no fact has a value of rank"
    assert found.residual().n == 0 and found.residuals()["rho"].isna().all()


def test_a_draw_without_any_value_is_left_out_in_silence(facts):
    """Few facts have a value: a draw of people may hold none of them."""
    some = np.where(np.arange(N) < 2, 1.0, np.nan)
    values = {("base", ""): some, ("control", ""): some * 0.5, ("unlearned", ""): some * 0.75}
    values |= {("unlearned", "attack"): some * 0.8, ("control", "attack"): some * 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _result(facts, values).residual()
        alone = _result(facts, {key: row for key, row in values.items() if key[0] != "control"}).residual()
    assert np.isnan(found.draws).any() and found.low == pytest.approx(0.6) and found.high == pytest.approx(0.6)
    assert alone.low == pytest.approx(0.6) and alone.high == pytest.approx(0.6)


def test_rho_is_the_ratio_of_means(facts):
    base, never = np.full(N, 1.0), _noise(1)
    ours, theirs = _noise(2) + 0.2, _noise(3)
    found = _result(
        facts,
        {
            ("base", ""): base,
            ("control", ""): never,
            ("unlearned", ""): _noise(4),
            ("base", "attack"): base,
            ("unlearned", "attack"): ours,
            ("control", "attack"): theirs,
        },
    ).residual()
    best = max(theirs.mean(), never.mean())  # the control without attack counts as well
    assert found.rho == pytest.approx((ours.mean() - best) / (base.mean() - never.mean()))
    assert found.low < found.rho < found.high
    assert found.n == N and found.variant == "attack" and found.against == "control" and not found.reason


def test_editing_the_rows_changes_no_residual(facts):
    values = {("base", ""): np.ones(N), ("control", ""): _noise(1), ("unlearned", ""): _noise(2)}
    result, untouched = (_result(facts, values) for _ in range(2))
    rows = result.frame
    rows["value"] *= 100
    assert result.residual() == untouched.residual()
    pd.testing.assert_frame_equal(result.residuals(), untouched.residuals())


def test_the_interval_is_that_of_resampled_groups(facts):
    values = {
        (role, variant): _noise(number) + extra
        for number, (role, variant, extra) in enumerate(
            [("base", "", 1.0), ("control", "", 0.0), ("unlearned", "a", 0.5), ("control", "a", 0.0)]
        )
    }
    found = _result(facts, values).residual()
    groups = np.array(facts.groups)
    names, rng, draws = sorted(set(groups)), np.random.default_rng(5), []
    for _ in range(4000):
        chosen = rng.choice(names, size=len(names))
        rows = np.concatenate([np.flatnonzero(groups == name) for name in chosen])
        mean = {key: row[rows].mean() for key, row in values.items()}
        top = mean["unlearned", "a"] - mean["control", "a"]
        draws.append(top / (mean["base", ""] - mean["control", ""]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.n_groups == len(names)
    assert found.low == pytest.approx(found.rho + widening(len(names)) * (low - found.rho), abs=0.03)
    assert found.high == pytest.approx(found.rho + widening(len(names)) * (high - found.rho), abs=0.03)


@pytest.mark.parametrize("n_groups", [2, 3, 6])
def test_few_groups_give_wide_intervals(facts, n_groups):
    """Of models that know nothing, as few have an interval without zero as a 95 % interval lets through."""
    rng = np.random.default_rng(1)
    group = np.arange(N) % n_groups
    missed = 0
    for _ in range(60):
        ours, theirs = (0.5 + rng.normal(0, 0.1, n_groups)[group] + rng.normal(0, 0.01, N) for _ in range(2))
        result = _result(facts, {("base", ""): np.ones(N), ("control", ""): theirs, ("unlearned", ""): ours})
        result.frame = result.frame.assign(group=[f"g{group[index]}" for index in result.frame["example_index"]])
        found = result.residual()
        missed += not found.low <= 0 <= found.high
    assert found.n_groups == n_groups and missed <= 7


def test_never_as_unlearned_is_exactly_zero(facts):
    base, never = (score_facts(model(name), facts) for name in ("demo:base", "demo:never"))
    frame = fact_rows(facts, [("base", "", base), ("unlearned", "", never), ("control", "", never)])
    result = StressResult(
        test="plain", level=0, measure="rank", frame=frame, proves="nothing", settings={}, seconds=0.0
    )
    for measure in ("rank", "logprob", "correct"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


def test_the_base_as_unlearned_is_exactly_one(facts):
    base, never = (score_facts(model(name), facts) for name in ("demo:base", "demo:never"))
    frame = fact_rows(facts, [("base", "", base), ("unlearned", "", base), ("control", "", never)])
    found = StressResult(
        test="plain", level=0, measure="rank", frame=frame, proves="nothing", settings={}, seconds=0.0
    ).residual("logprob")
    assert found.rho == found.low == found.high == 1


def test_without_anything_to_know_there_is_no_residual(facts):
    never = score_facts(model("demo:never"), facts)
    frame = fact_rows(facts, [(role, "", never) for role in ("base", "unlearned", "control")])
    found = StressResult(
        test="plain", level=0, measure="rank", frame=frame, proves="nothing", settings={}, seconds=0.0
    ).residual()
    assert found.rho is None and found.low is None and "no knowledge to look for" in found.reason


def test_the_worst_case_is_taken_for_both(facts):
    flat = {("base", ""): np.ones(N), ("control", ""): np.zeros(N)}
    attacked = {
        ("unlearned", "one"): np.full(N, 0.2),
        ("unlearned", "two"): np.full(N, 0.6),
        ("control", "one"): np.full(N, 0.3),
        ("control", "two"): np.full(N, 0.1),
    }
    result = _result(facts, flat | attacked)
    assert result.residual().rho == pytest.approx(0.3) and result.residual().variant == "two"
    table = result.residuals().set_index("variant")
    assert table.loc["one", "rho"] == pytest.approx(-0.1) and table.loc["two", "rho"] == pytest.approx(0.5)


def test_noise_in_the_never_models_variants_is_not_taken_for_knowledge(facts):
    """Of many variants that do nothing the best is above the mean, in both models alike."""
    draws = [(f"v{n}", _noise(100 + n), _noise(300 + n)) for n in range(20)]
    values = {("base", ""): np.ones(N), ("control", ""): np.full(N, 0.5)}
    for name, ours, theirs in draws:
        values |= {("unlearned", name): ours, ("control", name): theirs}
    found = _result(facts, values).residual()
    assert found.low < 0 < found.high


@pytest.mark.parametrize("variants", [1, 20])
def test_against_a_floor_the_lower_end_allows_for_the_choice_of_a_variant(facts, variants):
    """Of models that know nothing, as many have a lower end above zero as a 95 % interval lets through."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        values = {("base", ""): np.ones(N)}
        values |= {("unlearned", f"v{n}"): rng.uniform(0.3, 0.7, N) for n in range(variants)}
        found.append(_result(facts, values).residual())
    percentiles = [np.quantile(residual.draws, 0.025) for residual in found]
    assert np.mean([residual.low > 0 for residual in found]) <= 0.1
    assert variants == 1 or np.mean(np.array(percentiles) > 0) > 0.5  # what the percentile of the largest would say
    assert all(residual.low <= residual.rho <= residual.high for residual in found)
    assert all((residual.choice is None) == (variants == 1) for residual in found)
    if variants > 1:
        widened = [RunSpread(0.05, 8, 0).interval(residual) for residual in found]
        assert all(low < residual.low for (low, _), residual in zip(widened, found, strict=True))


def test_what_all_variants_know_is_found_against_a_floor(facts):
    values = {("base", ""): np.ones(N)} | {("unlearned", f"v{n}"): _noise(n) + 0.2 for n in range(20)}
    assert _result(facts, values).residual().low > 0.2


def test_several_controls_count_as_the_mean_of_each_ones_best(facts):
    values = {("base", ""): np.ones(N), ("unlearned", "a"): np.full(N, 0.8), ("unlearned", "b"): np.full(N, 0.1)}
    values |= {("control", ""): np.zeros(N), ("control 2", ""): np.full(N, 0.2)}
    values |= {("control", "a"): np.full(N, 0.4), ("control", "b"): np.zeros(N)}
    values |= {("control 2", "a"): np.full(N, 0.1), ("control 2", "b"): np.full(N, 0.6)}
    result = _result(facts, values)
    found = result.residual()
    assert found.rho == pytest.approx((0.8 - (0.4 + 0.6) / 2) / (1 - (0.0 + 0.2) / 2))
    assert found.n_controls == 2 and found.against == "control"
    np.testing.assert_allclose(found.draws, found.rho)
    assert found.run_variance == pytest.approx(np.var([0.4, 0.6], ddof=1) / 0.9**2)
    assert result.residuals().set_index("variant").loc["a", "control"] == pytest.approx(0.25)
    one = _result(facts, {key: row for key, row in values.items() if key[0] != "control 2"}).residual()
    assert one.n_controls == 1 and one.run_variance is None and one.rho == pytest.approx(0.8 - 0.4)
    alone = _result(facts, {key: row for key, row in values.items() if "control" not in key[0]}).residual()
    assert alone.n_controls == 0 and alone.run_variance is None and alone.against == "floor"


def test_the_variance_between_runs_is_without_that_of_people():
    """Each of many simulated cases has controls that differ by a run's own effect and by what each person adds."""
    of_runs, of_people, k = 0.05, 0.3, 3
    rng = np.random.default_rng(0)
    draws = rng.multinomial(N, np.full(N, 1 / N), size=400) / N
    weights = np.concatenate([np.full((1, N), 1 / N), draws])
    estimates, naive = [], []
    for _ in range(2000):
        scores = rng.normal(0, of_runs, (k, 1)) + rng.normal(0, of_people, (k, N))
        of_controls = scores @ weights.T
        estimates.append(_run_variance(of_controls, np.ones(len(weights))))
        naive.append(of_controls[:, 0].var(ddof=1))
    assert np.mean(naive) == pytest.approx(of_runs**2 + of_people**2 / N, rel=0.1)
    assert np.mean(estimates) == pytest.approx(of_runs**2, rel=0.15)


def test_a_floor_stands_in_for_never(facts):
    values = {("base", ""): np.ones(N), ("unlearned", ""): np.full(N, 0.75)}
    found = _result(facts, values).residual()
    assert found.rho == pytest.approx(0.5) and found.against == "floor"
    bare = _result(facts, values, measure="logprob").residual()
    assert bare.rho is None and "without a control" in bare.reason


def test_a_test_that_only_reads_is_compared_with_what_it_reads(facts):
    values = {("base", "layer 3"): np.ones(N), ("control", "layer 3"): np.zeros(N), ("unlearned", "layer 3"): _noise(1)}
    found = _result(facts, values, measure="lens", floors={}).residual()
    assert found.rho == pytest.approx(_noise(1).mean())


def test_examples_without_a_value_are_left_out(facts):
    ours = np.where(np.arange(N) < 6, np.nan, 0.75)
    found = _result(
        facts, {("base", ""): np.ones(N), ("unlearned", ""): ours, ("control", ""): np.full(N, 0.5)}
    ).residual()
    assert found.rho == pytest.approx(0.5) and found.n == N - 6


@cache
def _eight_facts():
    return case_of(model("demo:base")).forget.select(range(8))


@settings(max_examples=25)
@given(st.permutations(range(8)), st.integers(0, 3))
def test_the_order_of_rows_changes_nothing(order, seed):
    facts = _eight_facts()
    values = {
        (role, variant): _noise(seed + len(role + variant), 8) for role in ("unlearned", "control") for variant in "ab"
    }
    values |= {("base", ""): np.ones(8), ("control", ""): np.zeros(8)}
    result = _result(facts, values)
    rows = result.frame
    shuffled = pd.concat([rows[rows["example_index"] == place] for place in order])
    assert (
        result.residual()
        == StressResult(
            test="made-up", level=3, measure="rank", frame=shuffled, proves="nothing", settings={}, seconds=0.0
        ).residual()
    )
