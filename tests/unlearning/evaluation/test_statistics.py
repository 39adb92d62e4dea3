"""Bootstrap draws: against slow loops and known laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.common.bootstrap import clusters, times_drawn
from unlearning.evaluation.statistics import Metric, Resampled, Sample, combine, resample

VALUES = [0.1, 0.9, 0.4, 0.4, float("nan"), 0.7, 0.2, 0.6]
AUTHORS = ["a", "a", "b", "b", "b", "", "", "c"]


def test_mean_is_that_of_the_rows_that_have_a_value_in_every_draw() -> None:
    sample = Sample("forget", AUTHORS, seed=3, draws=50)
    found = sample.mean(VALUES)
    assert found is not None
    assert found.n == 7
    assert found.value == pytest.approx(np.nanmean(VALUES), abs=1e-15)
    for draw in range(50):
        rows = [value for value, times in zip(VALUES, sample.weights[draw], strict=True) for _ in range(int(times))]
        assert found.draws[draw] == pytest.approx(np.nanmean(rows), abs=1e-12)


def test_clusters_are_drawn_whole_and_as_many_as_there_are() -> None:
    weights = Sample("forget", AUTHORS, draws=200).weights
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 4]).all()
    # a, b, two rows alone, and c are five clusters.
    assert (weights[:, [0, 2, 5, 6, 7]].sum(axis=1) == 5).all()


def test_no_value_at_all_has_no_mean() -> None:
    assert Sample("forget", ["", ""]).mean([float("nan")] * 2) is None


def test_one_row_has_a_value_and_no_interval() -> None:
    found = Sample("forget", [""]).mean([0.5])
    assert found is not None
    assert (found.value, found.interval) == (0.5, None)


def test_sets_of_one_name_are_drawn_alike_and_others_apart() -> None:
    first, same, other = (Sample(name, [""] * 30, seed=1) for name in ("forget", "forget", "retain"))
    assert (first.weights == same.weights).all()
    assert (first.weights != other.weights).any()
    assert (first.weights != Sample("forget", [""] * 30, seed=2).weights).any()


def test_difference_of_equal_models_is_zero_without_spread() -> None:
    values = np.random.default_rng(0).random(40)
    ours, theirs = (Sample("forget", [""] * 40).mean(values) for _ in range(2))
    assert ours is not None and theirs is not None
    assert combine(np.subtract, ours, theirs).interval == (0.0, 0.0)


def test_paired_difference_is_tighter_than_that_of_two_sets() -> None:
    generator = np.random.default_rng(0)
    easy = generator.random(60)
    harder = easy - 0.1 + 0.01 * generator.random(60)
    paired = combine(np.subtract, *(Sample("forget", [""] * 60).mean(v) for v in (easy, harder)))  # type: ignore[arg-type]
    apart = combine(
        np.subtract,
        Sample("forget", [""] * 60).mean(easy),  # type: ignore[arg-type]
        Sample("retain", [""] * 60).mean(harder),  # type: ignore[arg-type]
    )
    assert paired.value == pytest.approx(apart.value)
    low, high = paired.interval or (0, 0)
    wide_low, wide_high = apart.interval or (0, 0)
    assert high - low < 0.1 * (wide_high - wide_low)


def test_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = Sample("forget", [""] * 400).mean(values)
    assert found is not None
    low, high = found.interval or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=20), st.integers(0, 5))
def test_every_draw_has_as_many_clusters_as_there_are(groups: list[str], seed: int) -> None:
    cluster = clusters(groups)
    weights = times_drawn(cluster, draws=20, seed=seed)
    firsts = [int(np.argmax(cluster == number)) for number in range(cluster.max() + 1)]
    assert (weights[:, firsts].sum(axis=1) == cluster.max() + 1).all()


def test_statistic_of_two_sets_takes_the_weights_of_each() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0])
    samples = Sample("x", [""] * 3, draws=4), Sample("y", [""] * 2, draws=4)
    found = resample(lambda v, w: v @ x + w @ y, *samples)
    assert found.value == 36
    assert found.n == 5
    assert found.draws == pytest.approx([samples[0].weights[d] @ x + samples[1].weights[d] @ y for d in range(4)])


def test_draws_that_are_mostly_no_numbers_have_no_interval() -> None:
    assert Resampled(1.0, np.array([np.nan, np.nan, 1.0]), 9).interval is None
    assert Resampled(1.0, np.array([np.nan, 1.0, 1.0]), 9).interval == (1.0, 1.0)


def test_metric_says_what_it_is() -> None:
    metric = Metric("forget_probability", None, "lower is better", "p", reason="give --control")
    assert metric.estimate is None and metric.reason == "give --control"
