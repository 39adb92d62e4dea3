"""A plan says what the rule does on simulated models."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dissect.stress.core.result import PLAIN, StressResult
from dissect.verdicts.planner import (
    POWER,
    Spread,
    components,
    ends,
    needed,
    needed_for,
    plan,
    prospect,
    shipped,
    spread_of,
)
from dissect.verdicts.rule import Rule, RuleEntry, frozen_rule, residual_knowledge, residuals_of
from unlearning.common.errors import InputError

RULE = Rule(
    tests=(RuleEntry("one"), RuleEntry("two")),
    needed=(),
    floor=0.0,
    ceiling=0.8,
    run_sd=0.05,
    not_unlearned_above=0.5,
    suppressed_above=0.05,
    margin=0.1,
    utility_floor=0.8,
    fitted={},
    reference={},
)
ONE = replace(RULE, tests=(RuleEntry("one"),))

BETWEEN = np.array([[0.06, 0.02], [0.02, 0.03]])
WITHIN = np.array([[0.5, 0.2], [0.2, 0.4]])
SPREAD = Spread(BETWEEN, WITHIN, np.array([1.0, 0.5]))
ALONE = Spread(BETWEEN[:1, :1], WITHIN[:1, :1], np.ones(1))
GAP = 0.5
"""What the base knows above the control."""


def simulate(
    seed: int, *, people: int, each: int, share: float = 0.0, run_sd: float = RULE.run_sd
) -> list[StressResult]:
    """Results of two tests whose values vary as the plan assumes."""
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(people), each)
    known = (generator.random(people) < share)[group]
    of_people = generator.multivariate_normal(np.zeros(2), BETWEEN, size=people)[group]
    of_facts = generator.multivariate_normal(np.zeros(2), WITHIN, size=len(group))
    rho = of_people + of_facts + run_sd * generator.standard_normal()
    rho = rho + known[:, None] * RULE.ceiling * SPREAD.strength
    control = 0.5 + 0.1 * generator.standard_normal(len(group))
    found = []
    for column, test in enumerate(("one", "two")):
        values = {
            ("base", PLAIN): control + GAP,
            ("control", PLAIN): control,
            ("unlearned", PLAIN): control - 5,  # far below: what counts is the attack
            ("control", "attack"): control,
            ("unlearned", "attack"): control + GAP * rho[:, column],
        }
        rows = [
            {"role": role, "variant": variant, "measure": "rank", "example": f"e{i}", "example_index": i}
            | {"group": f"p{group[i]}", "value": value}
            for (role, variant), series in values.items()
            for i, value in enumerate(series)
        ]
        frame = pd.DataFrame(rows)
        found.append(StressResult(test=test, level=4, measure="rank", frame=frame, proves="", settings={}, seconds=0.0))
    return found


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_plan_agrees_with_the_whole_rule_on_simulated_models(share: float) -> None:
    people, each, models = 16, 4, 60
    scores = [
        residual_knowledge(residuals_of(simulate(seed, people=people, each=each, share=share), RULE), RULE)
        for seed in range(models)
    ]
    planned = ends(SPREAD, RULE, people=people, facts=people * each, controls=1, share=share)
    for ours, theirs in zip(planned, ([score.low for score in scores], [score.high for score in scores]), strict=True):
        simulated = np.array(theirs, dtype=np.float64)
        error = math.hypot(ours.std(), simulated.std()) / math.sqrt(models)
        assert ours.mean() == pytest.approx(simulated.mean(), abs=3 * error + 0.02)
        assert np.quantile(ours, 0.8) == pytest.approx(np.quantile(simulated, 0.8), abs=4 * error + 0.02)


@pytest.mark.parametrize(("people", "each", "controls"), [(10, 6, 1), (40, 1, 1), (30, 5, 4)])
def test_one_entry_has_a_closed_form(people: int, each: int, controls: int) -> None:
    found = prospect(ALONE, ONE, people=people, facts=people * each, controls=controls)
    of_control = (1 + 1 / controls) / 2
    variance = of_control * (BETWEEN[0, 0] / people + WITHIN[0, 0] / (people * each))
    run = of_control * ONE.run_sd**2
    half = 1.96 * math.sqrt(variance * (people - 1) / people + run)
    sd = math.sqrt(variance + run)
    assert found.high == pytest.approx(half / ONE.ceiling, rel=0.12)
    assert found.margin_met == pytest.approx((half + 1.2816 * sd) / ONE.ceiling, rel=0.12)


def test_more_people_facts_and_controls_never_hurt() -> None:
    def row(people: int, each: int, controls: int) -> tuple[float, float, float, float]:
        found = prospect(SPREAD, RULE, people=people, facts=people * each, controls=controls)
        return found.high, found.margin_met, 1 - found.power, found.smallest_share or 2.0

    for numbers in (
        [(10, 4, 1), (20, 4, 1), (80, 4, 1)],
        [(20, 1, 1), (20, 4, 1), (20, 40, 1)],
        [(20, 4, n) for n in (1, 2, 8)],
    ):
        rows = [row(*one) for one in numbers]
        for before, after in zip(rows, rows[1:], strict=False):
            assert all(late <= early + 1e-9 for early, late in zip(before, after, strict=True)), numbers


def test_power_rises_with_the_margin() -> None:
    powers = [
        prospect(SPREAD, replace(RULE, margin=margin), people=40, facts=160).power for margin in (0.05, 0.15, 0.3, 0.9)
    ]
    assert powers == sorted(powers)
    assert powers[0] < 0.1 and powers[-1] > 0.99


def test_without_spread_everything_is_decided() -> None:
    nothing = Spread(np.zeros((2, 2)), np.zeros((2, 2)), np.ones(2))
    found = prospect(nothing, replace(RULE, run_sd=0.0), people=1000, facts=1000)
    assert found.high == pytest.approx(0.0, abs=1e-9) and found.power == 1.0
    assert found.smallest_share == pytest.approx(0.07, abs=0.025), "just above `suppressed_above`, but for who is known"


def test_what_is_needed_is_enough_and_no_more() -> None:
    calm = replace(RULE, run_sd=0.01)
    found = needed(SPREAD, calm, people=10, facts=40)
    assert found.people is not None and found.people > 10 and found.facts == 4 * found.people

    def power(people: int) -> float:
        return prospect(SPREAD, calm, people=people, facts=4 * people).power

    assert power(found.people - 1) < POWER <= power(found.people)
    assert f"it takes {found.people} groups ({found.facts} facts) with 1 control" in found.text
    again = needed(SPREAD, calm, people=found.people, facts=found.facts)
    assert again.people == found.people and "are enough" in again.text


def test_a_spread_of_runs_that_no_number_of_people_narrows_is_said() -> None:
    wild = replace(RULE, run_sd=0.2)
    found = needed(SPREAD, wild, people=10, facts=40)
    assert (found.people, found.facts, found.controls, found.together) == (None, None, None, None)
    for phrase in ("cannot be reached by more groups alone", "run_sd", "Nor by more controls", "`margin`"):
        assert phrase in found.text


def test_more_controls_are_proposed_where_they_help() -> None:
    between = replace(RULE, run_sd=0.028)
    found = needed(SPREAD, between, people=4000, facts=16000)
    assert found.people is None
    assert found.controls is not None or found.together is not None
    assert "controls" in found.text and "Nor by" not in found.text


def test_components_are_found_again() -> None:
    generator = np.random.default_rng(5)
    sizes = generator.integers(1, 9, size=3000)
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = generator.multivariate_normal([0.3, -1], BETWEEN, size=len(sizes))[group]
    values += generator.multivariate_normal([0, 0], WITHIN, size=len(group))
    between, within = components(values, group)
    np.testing.assert_allclose(between, BETWEEN, atol=0.02)
    np.testing.assert_allclose(within, WITHIN, atol=0.03)


def test_facts_without_groups_vary_over_people_alone() -> None:
    values = np.random.default_rng(6).standard_normal((50, 2))
    between, within = components(values, np.arange(50))
    np.testing.assert_allclose(between, np.cov(values.T), atol=1e-12)
    assert not within.any()


def test_the_spread_of_a_run_predicts_its_bootstrap() -> None:
    results = simulate(3, people=60, each=5, share=0.3)
    spread = spread_of(results, RULE)
    for index, found in enumerate(residuals_of(results, RULE).values()):
        variance = spread.between[index, index] / 60 + spread.within[index, index] / 300
        assert found.draws is not None
        assert math.sqrt(variance) == pytest.approx(found.draws.std(), rel=0.15)
    assert spread.strength == pytest.approx([1.0, 0.5], abs=0.2)


def test_a_run_says_what_it_would_take() -> None:
    found = needed_for(simulate(4, people=12, each=5), replace(RULE, run_sd=0.01))
    assert found.people is not None and found.people > 12 and found.facts == 5 * found.people


def test_a_run_without_a_control_is_refused() -> None:
    (one, two) = simulate(4, people=6, each=2)
    alone = [replace(result, frame=result.frame[result.frame["role"] != "control"]) for result in (one, two)]
    with pytest.raises(InputError, match="`results` must hold a test of the rule with a control"):
        spread_of(alone, RULE)


def test_a_plan_starts_from_what_is_at_hand() -> None:
    planned = plan(frozen_rule(), people=20, facts=120, controls=2)
    table = planned.table()
    assert table.loc[0, ["people", "facts", "controls"]].tolist() == [20, 120, 2]
    assert set(table["controls"]) == {2, 4} and (table["facts"] == 6 * table["people"]).all()
    assert "20 groups, 120 facts and 2 controls" in planned.sentences()[0]
    assert planned.needed.text in planned.sentences()


def test_a_plan_says_what_it_takes_to_find_a_quarter() -> None:
    calm = replace(RULE, run_sd=0.01)
    planned = plan(calm, people=20, facts=80, spread=SPREAD)
    people = planned.to_find_a_part
    assert people is not None and people > 20
    shares = [prospect(SPREAD, calm, people=n, facts=4 * n).smallest_share for n in (people, people - 1)]
    assert shares[0] is not None and shares[0] <= 0.25 < (shares[1] or 1.0)
    wild = plan(replace(RULE, run_sd=0.2), people=20, facts=80, spread=SPREAD)
    assert wild.to_find_a_part is None and "not found with any number" in wild.sentences()[1]


def test_the_shipped_spread_of_ranks_is_that_of_two_independent_uniform_ranks() -> None:
    spread = shipped(frozen_rule())
    for index, entry in enumerate(frozen_rule().tests):
        if entry.measure is None:
            variance = spread.between[index, index] + spread.within[index, index]
            assert variance == pytest.approx(2 / 12 / 0.5**2, rel=0.35)
    assert (np.linalg.eigvalsh(spread.between) > -0.01).all() and (np.linalg.eigvalsh(spread.within) > 0).all()


def test_an_unmeasured_entry_varies_like_one_of_its_measure() -> None:
    entries = (RuleEntry("relearn_disjoint", "accuracy"), RuleEntry("mine", "accuracy"))
    spread = shipped(replace(RULE, tests=entries))
    assert spread.within[1, 1] == spread.within[0, 0] > 0


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"people": 1, "facts": 5}, "`people` must be at least 2, got 1"),
        ({"people": 5, "facts": 4}, "`facts` must be at least the number of people, 5, got 4"),
        ({"people": 5, "facts": 10, "controls": 0}, "`controls` must be at least 1, got 0"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, int], phrase: str) -> None:
    with pytest.raises(InputError, match=phrase):
        plan(frozen_rule(), **arguments)
