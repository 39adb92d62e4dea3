"""Intervals of the scores of simulated models."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from dissect.verdicts.planning.populations import Population
from dissect.verdicts.rule import Rule
from dissect.verdicts.spread import PRIOR_DF, RunSpread
from unlearning.common.bootstrap import LEVEL, widening
from unlearning.common.errors import InputError, check_at_least

_MODELS, _DRAWS = 400, 800
"""Simulated models, and draws of the interval of each."""


@dataclass(frozen=True)
class Design:
    """What a verdict is made with.

    Attributes:
        people: Number of people (groups of facts); at least 2. Facts without groups count as one each.
        facts: Number of facts; at least one for each person.
        controls: Number of controls; 0 without a control.
    """

    people: int
    facts: int
    controls: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        check_at_least("people", self.people, 2)
        check_at_least("controls", self.controls, 0)
        if self.facts < self.people:
            raise InputError(f"`facts` must be at least the number of people, {self.people}, got {self.facts}")

    def with_people(self, people: int) -> "Design":
        """Return the design with another number of people, and as many facts for each."""
        return replace(self, people=people, facts=round(self.facts / self.people * people))

    def with_controls(self, controls: int) -> "Design":
        """Return the design with another number of controls."""
        return replace(self, controls=controls)

    @property
    def variance(self) -> float:
        """Variance of a residual against the mean of the controls, divided by that against one control."""
        return (1 + 1 / self.controls) / 2 if self.controls else 1.0


def ends(
    design: Design, population: Population, rule: Rule, *, share: float = 0.0
) -> tuple[Float[np.ndarray, " model"], Float[np.ndarray, " model"]]:
    """Simulate the lower and the upper end of the scores of models that hold a share of the facts.

    Args:
        design: People, facts and controls.
        population: The models.
        rule: The rule with its scale and `run_sd`, for verdicts with or without a control as the design has it.
        share: Share of the people that the models know, 0 to 1.

    Returns:
        Lower and upper ends of the 95 % intervals, one per simulated model, as many of each of the population's models.
    """
    runs = RunSpread(rule.run_sd * math.sqrt(design.variance), PRIOR_DF + max(design.controls, 1) - 1, design.controls)
    unknown = population.unknown_at(share)
    n_entries = unknown.shape[1]
    of_models, of_runs, of_draws = _numbers(n_entries)
    found = []
    for number, (known, others) in enumerate(zip(population.known, unknown, strict=True)):
        mine = slice(number, None, len(unknown))
        mixed = share * (1 - share) * np.outer(known - others, known - others)
        over_people = design.variance * population.between + mixed
        root = _root(over_people / design.people + design.variance * population.within / design.facts)
        mean = share * known + (1 - share) * others
        rho = mean + of_models[mine] @ root.T + runs.sd * of_runs[mine, None]
        # The bootstrap over n groups has (n - 1) / n of the variance of a mean of n; a verdict widens its draws.
        around = widening(design.people) * math.sqrt((design.people - 1) / design.people) * of_draws @ root.T
        deviates = runs.deviates(_DRAWS)
        allowance = max(float(np.quantile(around.max(1) + deviates, (1 + LEVEL) / 2)), 0.0)
        largest = rho[:, None, 0] + around[None, :, 0]
        for entry in range(1, n_entries):
            np.maximum(largest, rho[:, None, entry] + around[None, :, entry], out=largest)
        largest += deviates
        found.append([rho.max(1) - allowance, np.quantile(largest, (1 + LEVEL) / 2, axis=1)])
    low, high = rule.scaled(np.concatenate(found, axis=1))
    return low, high


@lru_cache(maxsize=4)
def _numbers(
    n_entries: int,
) -> tuple[Float[np.ndarray, "model entry"], Float[np.ndarray, " model"], Float[np.ndarray, "draw entry"]]:
    """Return the standard normal numbers of every simulation: of models, their runs, and the draws over people."""
    generator = np.random.default_rng(1)  # not that of the runs' deviates
    models, runs, draws = (generator.standard_normal(n) for n in ((_MODELS, n_entries), _MODELS, (_DRAWS, n_entries)))
    return models, runs, draws


def _root(covariance: Float[np.ndarray, "entry entry"]) -> Float[np.ndarray, "entry entry"]:
    """Return the symmetric square root of a covariance; negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)
