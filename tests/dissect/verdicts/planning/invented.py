"""An invented rule, populations, and results of tests whose values vary as a plan assumes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dissect.stress.core.result import PLAIN, StressResult
from dissect.verdicts.planning.populations import Population, Populations
from dissect.verdicts.rule import Rule, RuleEntry

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

BETWEEN = np.array([[0.06, 0.02], [0.02, 0.03]])
WITHIN = np.array([[0.5, 0.2], [0.2, 0.4]])
KNOWN = np.array([[0.8, 0.4]])
PLAIN_MODELS = Population(np.zeros(1), KNOWN, np.zeros((1, 1, 2)), BETWEEN, WITHIN)
AVOIDING = Population(np.array([0.0, 0.5]), KNOWN, np.array([[[-0.2, -0.1], [-0.4, -0.2]]]), BETWEEN, WITHIN)
POPULATIONS = Populations(PLAIN_MODELS, AVOIDING)
ONE = PLAIN_MODELS.of_entries([0])

GAP = 0.5
"""What the base knows above the control."""


def results_of(
    seed: int,
    *,
    people: int,
    each: int,
    share: float = 0.0,
    population: Population = PLAIN_MODELS,
    run_sd: float = RULE.run_sd,
    tests: Sequence[str] = ("one", "two"),
    has_control: bool = True,
    known: Sequence[bool] | None = None,
    names: Sequence[str] | None = None,
) -> list[StressResult]:
    """Return the results of tests on one model of the population, with values drawn as the plan assumes.

    Args:
        seed: Random seed.
        people: Number of people.
        each: Number of facts of each.
        share: Share of the people that the model knows.
        population: The models; the first one is taken.
        run_sd: Standard deviation between training runs.
        tests: Names of the tests, one for each entry.
        has_control: Whether there is a control; if not, models are compared with 1/2.
        known: Whether the model knows each person; drawn by the share if not given.
        names: Names of the people.
    """
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(people), each)
    holds = (np.asarray(known) if known is not None else generator.random(people) < share)[group]
    n = len(tests)
    of_people = generator.multivariate_normal(np.zeros(n), population.between, size=people)[group]
    of_facts = generator.multivariate_normal(np.zeros(n), population.within, size=len(group))
    rho = of_people + of_facts + run_sd * generator.standard_normal()
    rho = rho + np.where(holds[:, None], population.known[0], population.unknown_at(share)[0])
    control = np.full(len(group), 0.5)
    if has_control:
        control = control + 0.1 * generator.standard_normal(len(group))
    found = []
    for column, test in enumerate(tests):
        values = {
            ("base", PLAIN): control + GAP,
            ("control", PLAIN): control,
            ("unlearned", PLAIN): control - 5,  # far below: what counts is the attack
            ("control", "attack"): control,
            ("unlearned", "attack"): control + GAP * rho[:, column],
        }
        rows = [
            {"role": role, "variant": variant, "measure": "rank", "example": f"e{i}", "example_index": i}
            | {"group": names[group[i]] if names else f"p{group[i]}", "value": value}
            for (role, variant), series in values.items()
            if has_control or role != "control"
            for i, value in enumerate(series)
        ]
        frame = pd.DataFrame(rows)
        found.append(StressResult(test=test, level=4, measure="rank", frame=frame, proves="", settings={}, seconds=0.0))
    return found
