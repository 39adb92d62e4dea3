"""The numbers that ship are read for a rule's entries, and are what ranks must give."""

from dataclasses import replace

import numpy as np
import pytest

from dissect.verdicts.planning.populations import shipped
from dissect.verdicts.rule import RuleEntry, frozen_rule
from tests.dissect.verdicts.planning.invented import AVOIDING, RULE


@pytest.mark.parametrize("has_control", [True, False])
def test_shipped_populations_fit_the_rule(has_control: bool) -> None:
    rule = frozen_rule(has_control=has_control)
    found = shipped(rule, has_control=has_control)
    for population in (found.plain, found.avoiding):
        assert population.known.shape[1] == len(rule.tests)
        assert (population.known > population.unknown_at(0.25)).all()
        assert (np.linalg.eigvalsh(population.between) > -0.01).all()
        assert (np.linalg.eigvalsh(population.within) > 0).all()


def test_ranks_of_models_that_unlearning_moved_are_independent_of_the_control() -> None:
    spread = shipped(frozen_rule()).avoiding
    for index, entry in enumerate(frozen_rule().tests):
        if entry.measure is None:
            # Two independent uniform ranks, over a gap of 1/2; less where ranks are pushed together.
            variance = spread.between[index, index] + spread.within[index, index]
            assert variance == pytest.approx(2 / 12 / 0.5**2, rel=0.35)


def test_an_unmeasured_entry_varies_like_one_of_its_measure() -> None:
    entries = (RuleEntry("relearn_disjoint", "accuracy"), RuleEntry("mine", "accuracy"))
    found = shipped(replace(RULE, tests=entries)).plain
    assert found.within[1, 1] == found.within[0, 0] > 0


def test_unknown_people_are_interpolated_between_shares() -> None:
    assert AVOIDING.unknown_at(0.25)[0] == pytest.approx([-0.3, -0.15])
    assert AVOIDING.unknown_at(0.9)[0] == pytest.approx([-0.4, -0.2])
