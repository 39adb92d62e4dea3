"""A plan: what verdicts on several numbers of people and controls can decide, before anything is run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dissect.verdicts.planning.needs import (
    POWER,
    Needed,
    controls_in_words,
    counted,
    power,
    smallest_share,
    to_call_erased,
    to_find,
)
from dissect.verdicts.planning.populations import Populations, shipped
from dissect.verdicts.planning.simulation import Design, ends
from dissect.verdicts.rule import Rule

A_PART = 0.25
"""Share of the facts for which a plan says what it takes to find them."""

_AVOIDING = ", where unlearning pushed the other answers below chance as NPO and DPO do"


@dataclass(frozen=True)
class Prospect:
    """What a verdict on so many people with so many controls can decide.

    Attributes:
        people: Number of people (groups of facts).
        facts: Number of facts.
        controls: Number of controls; 0 without a control.
        high: Median of the upper end of the score of a model without the knowledge.
        margin_met: Margin below which such a model's upper end lies with the plan's power.
        power: Probability that such a model's upper end lies below the rule's margin.
        false_alarm: Probability that such a model is called suppressed.
        smallest_share: Smallest share of the facts whose presence is found (lower end above the rule's
            `suppressed_above`) with the plan's power, if the model scores like a control for the others; None if not
            even all of them are.
        smallest_share_avoiding: The same if unlearning pushed the answers that the model does not hold below chance.
    """

    people: int
    facts: int
    controls: int
    high: float
    margin_met: float
    power: float
    false_alarm: float
    smallest_share: float | None
    smallest_share_avoiding: float | None


@dataclass(frozen=True)
class Plan:
    """Prospects of several numbers of people and controls.

    Attributes:
        rows: The prospects, the smallest numbers first.
        needed: What it takes from the first of them to call a model without the knowledge erased.
        to_find_a_part: What it takes to find a model that holds `A_PART` of the facts.
        to_find_a_part_avoiding: The same if unlearning pushed the answers that the model does not hold below chance.
        margin: The rule's margin.
    """

    rows: tuple[Prospect, ...]
    needed: Needed
    to_find_a_part: Needed
    to_find_a_part_avoiding: Needed
    margin: float

    def table(self) -> pd.DataFrame:
        """Return the prospects as a table, one row each, with the columns of `Prospect`."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def sentences(self) -> list[str]:
        """Return what the plan says in words."""
        first = self.rows[0]
        return [
            f"{counted(first.people, 'group')}, {counted(first.facts, 'fact')}, {controls_in_words(first.controls)}: "
            f"the smallest share of the facts that is found with {POWER:.0%} power is {_share(first.smallest_share)}; "
            f"it is {_share(first.smallest_share_avoiding)}{_AVOIDING}. A model that knows nothing has an upper end of "
            f"{first.high:.2f} (median), and is called suppressed with a probability of {first.false_alarm:.0%}.",
            self.to_find_a_part.text,
            self.to_find_a_part_avoiding.text,
            self.needed.text,
            "A plan assumes attacks that take hold and a model that keeps its utility. Its numbers come from small "
            "models with facts about people (`dissect.verdicts.planning.populations`).",
        ]


def plan(
    rule: Rule,
    *,
    people: int,
    facts: int,
    controls: int = 1,
    populations: Populations | None = None,
) -> Plan:
    """Plan a verdict before anything is run.

    Args:
        rule: The rule with its margin, scale and `run_sd`: `frozen_rule(has_control=False)` if there are no controls.
        people: Number of people (groups of forget facts) at hand; at least 2. Facts without groups count as one each.
        facts: Number of forget facts at hand.
        controls: Number of controls at hand; 0 plans a verdict without a control.
        populations: How residuals vary, for the rule's entries; None takes what ships.

    Returns:
        Prospects for 1, 2, 4 and 8 times as many people, with the controls at hand, and with 2 and 4.

    Raises:
        InputError: There are fewer than 2 people, or fewer facts than people.

    Examples:
        >>> from dissect.verdicts.rule import frozen_rule
        >>> planned = plan(frozen_rule(), people=20, facts=120)
        >>> planned.rows[0].people, planned.rows[0].controls
        (20, 1)
        >>> planned.rows[-1].margin_met < planned.rows[0].margin_met
        True
    """
    design = Design(people, facts, controls)
    models = populations or shipped(rule, has_control=controls > 0)
    rows = tuple(
        prospect(design.with_people(people * times).with_controls(n), models, rule)
        for times in (1, 2, 4, 8)
        for n in _controls(controls)
    )
    return Plan(
        rows,
        to_call_erased(design, models.plain, rule),
        to_find(A_PART, design, models.plain, rule),
        to_find(A_PART, design, models.avoiding, rule, where=_AVOIDING),
        rule.margin,
    )


def prospect(design: Design, populations: Populations, rule: Rule) -> Prospect:
    """Compute what a verdict can decide.

    Args:
        design: People, facts and controls.
        populations: How residuals vary.
        rule: The rule, for verdicts with or without a control as the design has it.

    Returns:
        The prospect.
    """
    low, high = ends(design, populations.plain, rule)
    return Prospect(
        **vars(design),
        high=float(np.median(high)),
        margin_met=float(np.quantile(high, POWER)),
        power=power(design, populations.plain, rule),
        false_alarm=float((low > rule.suppressed_above).mean()),
        smallest_share=smallest_share(design, populations.plain, rule),
        smallest_share_avoiding=smallest_share(design, populations.avoiding, rule),
    )


def _controls(at_hand: int) -> Sequence[int]:
    """Return the numbers of controls of a plan's rows."""
    return sorted({at_hand, *(n for n in (2, 4) if n > at_hand)}) if at_hand else (0,)


def _share(found: float | None) -> str:
    return "more than all of them" if found is None else f"{found:.0%}"
