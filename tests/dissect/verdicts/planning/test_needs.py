"""What a plan asks for is enough, and no more than that."""

from dataclasses import replace

import pytest

from dissect.verdicts.planning.needs import POWER, needed_for, power, smallest_share, to_call_erased, to_find
from dissect.verdicts.planning.populations import Population
from dissect.verdicts.planning.simulation import Design
from tests.dissect.verdicts.planning.invented import AVOIDING, PLAIN_MODELS, RULE, results_of

CALM, WILD = replace(RULE, run_sd=0.01), replace(RULE, run_sd=0.2)


def test_power_rises_with_the_margin() -> None:
    powers = [power(Design(40, 160), PLAIN_MODELS, replace(RULE, margin=margin)) for margin in (0.05, 0.15, 0.3, 0.9)]
    assert powers == sorted(powers)
    assert powers[0] < 0.1 and powers[-1] > 0.99


def test_what_is_needed_is_enough_and_no_more() -> None:
    found = to_call_erased(Design(10, 40), PLAIN_MODELS, CALM)
    assert found.people is not None and found.people > 10 and found.facts == 4 * found.people
    few, enough = (power(Design(n, 4 * n), PLAIN_MODELS, CALM) for n in (found.people - 1, found.people))
    assert few < POWER <= enough
    assert f"it takes {found.people} groups ({found.facts} facts) with 1 control" in found.text
    again = to_call_erased(Design(found.people, found.facts), PLAIN_MODELS, CALM)
    assert again.people == found.people and "are enough" in again.text


@pytest.mark.parametrize(("population", "share"), [(PLAIN_MODELS, 0.25), (AVOIDING, 0.5)])
def test_the_people_that_find_a_share_find_no_smaller_one_with_fewer(population: Population, share: float) -> None:
    found = to_find(share, Design(10, 40), population, CALM)
    assert found.people is not None and found.people > 10
    few, enough = (smallest_share(Design(n, 4 * n), population, CALM) for n in (found.people - 1, found.people))
    assert enough is not None and enough <= share < (few or 1.0)


def test_what_unlearning_did_to_other_people_hides_a_share() -> None:
    design = Design(100, 400)
    plain, avoiding = (smallest_share(design, population, CALM) for population in (PLAIN_MODELS, AVOIDING))
    assert plain is not None and avoiding is not None and avoiding > plain + 0.1


def test_more_controls_are_proposed_where_they_help() -> None:
    found = to_call_erased(Design(4000, 16000), PLAIN_MODELS, replace(RULE, run_sd=0.028))
    assert found.people is None and found.controls is not None
    assert f"it takes {found.controls} controls with 4000 groups" in found.text
    fewer = power(Design(4000, 16000, found.controls - 1), PLAIN_MODELS, replace(RULE, run_sd=0.028))
    assert fewer < POWER


def test_a_spread_of_runs_that_no_number_of_people_narrows_is_said() -> None:
    found = to_call_erased(Design(10, 40), PLAIN_MODELS, WILD)
    assert (found.people, found.facts, found.controls, found.together) == (None, None, None, None)
    for phrase in ("no number of groups with 1 control is enough", "differ by 0.200 (run_sd)", "Nor are more controls"):
        assert phrase in found.text


def test_without_a_control_only_people_are_asked_for() -> None:
    found = to_call_erased(Design(10, 40, 0), PLAIN_MODELS, CALM)
    assert found.people is not None and (found.controls, found.together) == (None, None)
    assert f"it takes {found.people} groups ({found.facts} facts) without a control." in found.text
    wild = to_call_erased(Design(10, 40, 0), PLAIN_MODELS, WILD)
    assert "without a control is enough" in wild.text and "Nor" not in wild.text


def test_a_run_says_what_it_would_take() -> None:
    found = needed_for(results_of(4, people=12, each=5), CALM)
    assert found.people is not None and found.people > 12 and found.facts == 5 * found.people


def test_a_run_without_a_control_says_what_it_would_take() -> None:
    found = needed_for(results_of(4, people=12, each=5, has_control=False), CALM)
    assert found.people is not None and found.people > 12 and "without a control" in found.text
