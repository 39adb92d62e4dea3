"""Simulated intervals are those of the rule on models that vary as the plan assumes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t

from dissect.verdicts.planning.populations import Population
from dissect.verdicts.planning.simulation import Design, ends
from dissect.verdicts.rule import RuleEntry, Score, residual_knowledge, residuals_of
from tests.dissect.verdicts.planning.invented import AVOIDING, BETWEEN, ONE, PLAIN_MODELS, RULE, WITHIN, results_of
from unlearning.common.errors import InputError


@pytest.mark.parametrize(
    ("population", "share", "has_control"),
    [(PLAIN_MODELS, 0.0, True), (PLAIN_MODELS, 0.4, True), (AVOIDING, 0.6, True), (PLAIN_MODELS, 0.4, False)],
)
def test_the_plan_agrees_with_the_whole_rule_on_simulated_models(
    population: Population, share: float, has_control: bool
) -> None:
    people, each, models = 16, 4, 60

    def judged(seed: int) -> Score:
        results = results_of(
            seed, people=people, each=each, share=share, population=population, has_control=has_control
        )
        return residual_knowledge(residuals_of(results, RULE), RULE)

    scores = [judged(seed) for seed in range(models)]
    planned = ends(Design(people, people * each, int(has_control)), population, RULE, share=share)
    for ours, theirs in zip(planned, ([score.low for score in scores], [score.high for score in scores]), strict=True):
        simulated = np.array(theirs, dtype=np.float64)
        error = math.hypot(ours.std(), simulated.std()) / math.sqrt(models)
        assert ours.mean() == pytest.approx(simulated.mean(), abs=3 * error + 0.02)
        assert np.quantile(ours, 0.8) == pytest.approx(np.quantile(simulated, 0.8), abs=4 * error + 0.02)


@pytest.mark.parametrize(("people", "each", "controls"), [(10, 6, 1), (40, 1, 1), (30, 5, 4), (30, 5, 0)])
def test_one_entry_has_a_closed_form(people: int, each: int, controls: int) -> None:
    rule = replace(RULE, tests=(RuleEntry("one"),))
    high = ends(Design(people, people * each, controls), ONE, rule)[1]
    factor = (1 + 1 / controls) / 2 if controls else 1.0
    variance = factor * (BETWEEN[0, 0] / people + WITHIN[0, 0] / (people * each))
    run = factor * rule.run_sd**2
    students = float(t.ppf(0.975, people - 1))
    half = math.sqrt(students**2 * variance + 1.96**2 * run)
    sd = math.sqrt(variance + run)
    assert np.median(high) == pytest.approx(half / rule.ceiling, rel=0.12)
    assert np.quantile(high, 0.9) == pytest.approx((half + 1.2816 * sd) / rule.ceiling, rel=0.12)


def test_a_population_of_several_models_is_simulated_from_each() -> None:
    two = Population(
        np.zeros(1), np.array([[0.2], [0.7]]), np.zeros((2, 1, 1)), np.full((1, 1), 1e-6), np.full((1, 1), 1e-6)
    )
    rule = replace(RULE, tests=(RuleEntry("one"),), run_sd=0.0)
    low, high = ends(Design(100, 200), two, rule, share=1.0)
    middle = (low + high) / 2 * rule.ceiling
    assert np.sort(middle) == pytest.approx([0.2] * (len(low) // 2) + [0.7] * (len(low) // 2), abs=0.01)


def test_a_design_keeps_the_facts_of_each_person() -> None:
    assert Design(20, 130).with_people(40) == Design(40, 260)
    assert Design(20, 130).with_controls(4) == Design(20, 130, 4)


@pytest.mark.parametrize(
    ("numbers", "phrase"),
    [
        ((1, 5), "`people` must be at least 2, got 1"),
        ((5, 4), "`facts` must be at least the number of people, 5, got 4"),
        ((5, 10, -1), "`controls` must be at least 0, got -1"),
    ],
)
def test_impossible_numbers_are_refused(numbers: tuple[int, ...], phrase: str) -> None:
    with pytest.raises(InputError, match=phrase):
        Design(*numbers)
