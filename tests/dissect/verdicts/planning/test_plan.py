"""A plan starts from what is at hand, and says in sentences what its numbers say."""

from dataclasses import replace

import numpy as np
import pytest

from dissect.verdicts.planning.plan import plan, prospect
from dissect.verdicts.planning.populations import Population, Populations, shipped
from dissect.verdicts.planning.simulation import Design
from dissect.verdicts.rule import frozen_rule
from tests.dissect.verdicts.planning.invented import POPULATIONS, RULE

CALM = replace(RULE, run_sd=0.01)


def test_more_people_facts_and_controls_never_hurt() -> None:
    def row(design: Design) -> tuple[float, float, float, float, float]:
        found = prospect(design, POPULATIONS, RULE)
        shares = (found.smallest_share or 2.0, found.smallest_share_avoiding or 2.0)
        return found.high, found.margin_met, 1 - found.power, *shares

    for designs in (
        [Design(10, 40), Design(20, 80), Design(80, 320)],
        [Design(20, 20), Design(20, 80), Design(20, 800)],
        [Design(20, 80, n) for n in (1, 2, 8)],
    ):
        rows = [row(one) for one in designs]
        for before, after in zip(rows, rows[1:], strict=False):
            assert all(late <= early + 1e-9 for early, late in zip(before, after, strict=True)), designs


def test_without_spread_everything_is_decided() -> None:
    none = np.zeros((2, 2))
    calm = Population(np.zeros(1), np.array([[0.8, 0.4]]), np.zeros((1, 1, 2)), none, none)
    found = prospect(Design(1000, 1000), Populations(calm, calm), replace(RULE, run_sd=0.0))
    assert found.high == pytest.approx(0.0, abs=1e-9) and (found.power, found.false_alarm) == (1.0, 0.0)
    assert found.smallest_share == pytest.approx(0.07, abs=0.025), "just above `suppressed_above`, but for who is known"


def test_a_plan_starts_from_what_is_at_hand() -> None:
    planned = plan(CALM, people=20, facts=120, controls=2, populations=POPULATIONS)
    table = planned.table()
    assert table.loc[0, ["people", "facts", "controls"]].tolist() == [20, 120, 2]
    assert set(table["controls"]) == {2, 4} and table["facts"].tolist() == (6 * table["people"]).tolist()
    said = planned.sentences()
    assert said[0].startswith("20 groups, 120 facts, with 2 controls")
    first = planned.rows[0]
    for share in (first.smallest_share, first.smallest_share_avoiding):
        assert share is not None and f"{share:.0%}" in said[0]
    for needed in (planned.needed, planned.to_find_a_part, planned.to_find_a_part_avoiding):
        assert needed.text in said


def test_a_plan_without_a_control_has_a_rule_of_its_own() -> None:
    rule = frozen_rule(has_control=False)
    planned = plan(rule, people=20, facts=120, controls=0)
    assert {row.controls for row in planned.rows} == {0}
    assert "without a control" in planned.sentences()[0] and planned.needed.controls is None
    assert planned.rows[0] == prospect(Design(20, 120, 0), shipped(rule, has_control=False), rule)
