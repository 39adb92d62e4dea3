"""The fewest people and controls with which a verdict decides."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from dissect.stress.core.result import StressResult
from dissect.verdicts.planning.measure import components, fact_residuals, groups_of
from dissect.verdicts.planning.populations import Population, shipped
from dissect.verdicts.planning.simulation import Design, ends
from dissect.verdicts.rule import Rule, residuals_of
from dissect.verdicts.spread import run_spread

POWER = 0.9
"""Probability with which a plan decides what it is to decide."""

MOST_PEOPLE = 5000
"""More people than this are not proposed."""

MOST_CONTROLS = 16
"""More controls than this are not proposed."""

_STEP = 0.01
"""Step of the shares of facts that are tried."""


@dataclass(frozen=True)
class Needed:
    """What it takes to decide with the plan's power.

    Attributes:
        people: Number of people with the controls at hand; None if no number is enough.
        facts: The same in facts.
        controls: Number of controls with the people at hand; None if no number is enough, or there is no control.
        together: Number of people and of controls where more controls make people enough; None if none do, or the
            controls at hand do.
        text: The same in a sentence or two.
    """

    people: int | None
    facts: int | None
    controls: int | None
    together: tuple[int, int] | None
    text: str


def is_called_erased(design: Design, population: Population, rule: Rule) -> bool:
    """Return whether the score of a model without the knowledge lies below the margin with the plan's power."""
    return power(design, population, rule) >= POWER


def power(design: Design, population: Population, rule: Rule) -> float:
    """Return the probability that the upper end of a model without the knowledge lies below the margin."""
    return float((ends(design, population, rule)[1] < rule.margin).mean())


def is_found(share: float, design: Design, population: Population, rule: Rule) -> bool:
    """Return whether models that hold a share of the facts are called suppressed with the plan's power."""
    low = ends(design, population, rule, share=share)[0]
    return float((low > rule.suppressed_above).mean()) >= POWER


def smallest_share(design: Design, population: Population, rule: Rule) -> float | None:
    """Return the smallest share of the facts that is found with the plan's power; None if not even all of them are."""
    step = _smallest(lambda step: is_found(step * _STEP, design, population, rule), 1, round(1 / _STEP))
    return None if step is None else round(step * _STEP, 2)


def to_call_erased(design: Design, population: Population, rule: Rule) -> Needed:
    """Find how many people or controls it takes to call a model without the knowledge erased.

    Args:
        design: People, facts and controls at hand; more people come with as many facts each.
        population: The models, of which those without the knowledge count.
        rule: The rule, for verdicts with or without a control as the design has it.

    Returns:
        The numbers.
    """

    def at_most(n_controls: int) -> str:
        most = design.with_people(MOST_PEOPLE).with_controls(n_controls)
        high = float(np.median(ends(most, population, rule)[1]))
        return f"an upper end of {high:.2f} (median)"

    goal = f"To call a model that knows nothing erased (upper end below {rule.margin:.2f}) with {POWER:.0%} power"
    return _search(design, lambda one: is_called_erased(one, population, rule), goal, at_most, rule.run_sd)


def to_find(share: float, design: Design, population: Population, rule: Rule, *, where: str = "") -> Needed:
    """Find how many people or controls it takes to find a model that holds a share of the facts.

    Args:
        share: Share of the facts.
        design: People, facts and controls at hand; more people come with as many facts each.
        population: The models.
        rule: The rule, for verdicts with or without a control as the design has it.
        where: What the sentence adds about the models.

    Returns:
        The numbers.
    """

    def at_most(n_controls: int) -> str:
        found = smallest_share(design.with_people(MOST_PEOPLE).with_controls(n_controls), population, rule)
        return "not even all of the facts" if found is None else f"{found:.0%} of the facts as the smallest share found"

    goal = f"To find a model that holds {share:.0%} of the facts with {POWER:.0%} power{where}"
    return _search(design, lambda one: is_found(share, one, population, rule), goal, at_most, rule.run_sd)


def needed_for(results: Iterable[StressResult], rule: Rule) -> Needed:
    """Say what it takes to decide, from the spread of a run's own results, with or without a control.

    The people of the plan vary as those of the run do. Where the model knows part of the facts, this includes the
    spread of what it knows, and the numbers are too high rather than too low.

    Args:
        results: The results of a verdict, such as `Verdict.results`; those of the rule's tests count.
        rule: The rule that is applied, such as `Verdict.rule`.

    Returns:
        What a model without the knowledge takes to be called erased.

    Raises:
        InputError: No test of the rule has a residual and two groups.

    Examples:
        >>> from dissect import load_verdict
        >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
        >>> needed_for(found.results, found.rule).text  # doctest: +SKIP
        '...'
    """
    tests = {entry.test for entry in rule.tests}
    results = [result for result in results if result.test in tests]
    facts = fact_residuals(results, rule)
    rule = replace(rule, tests=tuple(entry for entry in rule.tests if str(entry) in facts.ours.columns))
    groups = groups_of(facts)
    between, within = components(facts.apart(), groups)
    design = Design(int(groups.max()) + 1, len(groups), facts.n_controls)
    used = [found for found in residuals_of(results, rule).values() if found.rho is not None]
    runs = run_spread(used, rule.run_sd)
    own = replace(
        shipped(rule, has_control=design.controls > 0).plain,
        between=between / design.variance,
        within=within / design.variance,
    )
    return to_call_erased(design, own, replace(rule, run_sd=runs.sd / math.sqrt(design.variance)))


def _search(
    design: Design, is_enough: Callable[[Design], bool], goal: str, at_most: Callable[[int], str], run_sd: float
) -> Needed:
    """Search for the fewest people and controls, and say what was found.

    Args:
        design: What is at hand.
        is_enough: Whether a design reaches the goal.
        goal: The goal, as a sentence begins.
        at_most: From a number of controls to what it gives with `MOST_PEOPLE`.
        run_sd: Standard deviation between training runs, for the sentence.

    Returns:
        The numbers and the sentence.
    """

    def people_with(controls: int) -> int | None:
        with_them = design.with_controls(controls)
        return _smallest(lambda n: is_enough(with_them.with_people(n)), design.people, MOST_PEOPLE)

    people = people_with(design.controls)
    controls, together = None, None
    if design.controls:
        controls = _smallest(lambda n: is_enough(design.with_controls(n)), design.controls, MOST_CONTROLS)
        if people is None and controls is None:
            more = ((people_with(n), n) for n in (2, 4, 8, MOST_CONTROLS) if n > design.controls)
            together = next(((found, n) for found, n in more if found is not None), None)
    facts = None if people is None else design.with_people(people).facts
    found = Needed(people, facts, controls, together, "")
    return replace(found, text=_text(design, found, goal, at_most, run_sd))


def _text(design: Design, found: Needed, goal: str, at_most: Callable[[int], str], run_sd: float) -> str:
    groups, control = counted(design.people, "group"), controls_in_words(design.controls)
    if found.people == design.people:
        return f"{goal}, {groups} {control} are enough."
    ways = []
    if found.people is not None:
        ways.append(f"{found.people} groups ({found.facts} facts) {control}")
    if found.controls is not None:
        ways.append(f"{found.controls} controls with {groups}")
    if found.together is not None:
        people, controls = found.together
        ways.append(f"{people} groups ({design.with_people(people).facts} facts) with {controls} controls")
    takes = f"{goal}, it takes {', or '.join(ways)}." if ways else ""
    if found.people is not None:
        return takes
    alone = (
        f"No number of groups {control} is enough: two training runs differ by {run_sd:.3f} (run_sd), and "
        f"{MOST_PEOPLE} groups give {at_most(design.controls)}."
    )
    if ways:
        return f"{takes} {alone}"
    more = f" Nor are more controls: {MOST_CONTROLS} give {at_most(MOST_CONTROLS)}." if design.controls else ""
    return f"{goal}, {alone[0].lower()}{alone[1:]}{more}"


def counted(n: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def controls_in_words(n: int) -> str:
    """Return what is said of a number of controls: `with 2 controls`, `without a control`."""
    return f"with {counted(n, 'control')}" if n else "without a control"


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the smallest integer from `low` to `high` from which on something holds; None if there is none."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
