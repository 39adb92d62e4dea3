"""What facts add to residuals, and how it varies over people and facts."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dissect.verdicts.planning.measure import components, fact_residuals, groups_of
from dissect.verdicts.rule import residuals_of
from tests.dissect.verdicts.planning.invented import BETWEEN, RULE, WITHIN, results_of
from unlearning.common.errors import InputError


@pytest.mark.parametrize("has_control", [True, False])
def test_the_facts_add_up_to_the_residual_and_predict_its_bootstrap(has_control: bool) -> None:
    results = results_of(3, people=60, each=5, share=0.3, has_control=has_control)
    facts = fact_residuals(results, RULE)
    assert facts.n_controls == int(has_control)
    between, within = components(facts.apart(), groups_of(facts))
    for index, found in enumerate(residuals_of(results, RULE).values()):
        assert facts.rho[index] == pytest.approx(found.rho)
        assert found.draws is not None
        variance = between[index, index] / 60 + within[index, index] / 300
        assert math.sqrt(variance) == pytest.approx(found.draws.std(), rel=0.15)


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


def test_an_entry_without_a_floor_has_no_spread_without_a_control() -> None:
    results = [replace(one, floors={}) for one in results_of(4, people=6, each=2, has_control=False)]
    with pytest.raises(InputError, match="`results` must hold a test of the rule with a residual"):
        fact_residuals(results, RULE)
