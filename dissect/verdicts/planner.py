"""How many people, facts and controls a verdict takes, from the spread of residuals.

A verdict's score is the largest of several residuals (`dissect.verdicts.rule`). In the plan, the residuals of the
rule's entries are jointly normal around what the model knows:

    rho = share * ceiling * strength + N(0, f (between / people + within / facts)) + N(0, f run_sd^2)

`between` and `within` are the covariances of the entries over people and over the facts of one person. The last term is
common to all entries: two models without the knowledge, trained on the same texts in another order, differ by it. With
k controls, the control's half of the variance is that of a mean of k: f = (1 + 1/k) / 2, as in
`dissect.verdicts.spread`. The verdict's interval is computed for many such models, as the rule computes it, on fixed
random numbers; so a plan is reproducible, and smooth in people and controls.

What a plan does not know: attacks that do not take hold, utility, and the tests outside the score.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dissect.stress.core.result import PLAIN, StressResult, controls_in
from dissect.verdicts.rule import Rule, RuleEntry, residuals_of
from dissect.verdicts.spread import PRIOR_DF, RunSpread, run_spread
from unlearning.common.bootstrap import LEVEL, clusters
from unlearning.common.errors import InputError, check_at_least

POWER = 0.9
"""Probability with which a plan finds what it is to find."""

MOST_PEOPLE = 5000
"""More people than this are not proposed."""

MOST_CONTROLS = 16
"""More controls than this are not proposed."""

_MODELS, _DRAWS = 400, 800
"""Simulated models, and draws of the interval of each."""

A_PART = 0.25
"""Share of the facts for which a plan says what it takes to find them."""

_STEP = 0.01
"""Step of the shares of facts that are tried."""


_ENTRIES = ("relearn_disjoint", "relearn_disjoint:accuracy", "relearn_benign", "relearn_benign:accuracy")
"""Entries whose spread was measured, by `spread_of` on the nine built-in unlearned models, each with the control of its
family (quick budget, 120 facts); the numbers are means over them. Two ranks that are independent and uniform, over
a gap of 1/2, give `between` + `within` = 2 (1/12) / (1/2)^2 = .67 for an entry of ranks."""

_BETWEEN = np.array(
    [
        [0.043, 0.015, 0.02, 0.005],
        [0.015, 0.023, 0.017, 0.009],
        [0.02, 0.017, 0.041, 0.015],
        [0.005, 0.009, 0.015, 0.024],
    ]
)
_WITHIN = np.array(
    [
        [0.559, 0.283, 0.117, 0.05],
        [0.283, 0.417, 0.054, 0.012],
        [0.117, 0.054, 0.676, 0.304],
        [0.05, 0.012, 0.304, 0.461],
    ]
)
_STRENGTH = np.array([1.0, 0.73, 0.35, 0.2])


@dataclass(frozen=True, eq=False)
class Spread:
    """How the residuals of a rule's entries vary, in units of rho.

    Attributes:
        between: Covariance over people (groups) of the entries' means of one person, [entry, entry].
        within: Covariance over the facts of one person, [entry, entry].
        strength: rho of each entry, divided by the largest, for a model that knows, [entry].
    """

    between: Float[np.ndarray, "entry entry"]
    within: Float[np.ndarray, "entry entry"]
    strength: Float[np.ndarray, " entry"]


@dataclass(frozen=True)
class Prospect:
    """What a verdict on so many people with so many controls can decide.

    Attributes:
        people: Number of people (groups of facts).
        facts: Number of facts.
        controls: Number of controls.
        high: Median of the upper end of the score of a model without the knowledge.
        margin_met: Margin below which such a model's upper end lies with the plan's power.
        power: Probability that such a model's upper end lies below the rule's margin.
        smallest_share: Smallest share of the facts whose presence is found (lower end above the rule's
            `suppressed_above`) with the plan's power; None if not even all of them are.
    """

    people: int
    facts: int
    controls: int
    high: float
    margin_met: float
    power: float
    smallest_share: float | None


@dataclass(frozen=True)
class Needed:
    """What it takes to call a model without the knowledge erased, with the plan's power.

    Attributes:
        people: Number of people with the controls at hand; None if no number is enough.
        facts: The same in facts.
        controls: Number of controls with the people at hand; None if no number is enough.
        together: Number of people and of controls where neither alone is enough, or where both together take fewer
            people; None if there are none.
        text: The same in one sentence or two.
    """

    people: int | None
    facts: int | None
    controls: int | None
    together: tuple[int, int] | None
    text: str


@dataclass(frozen=True)
class Plan:
    """Prospects of several numbers of people and controls.

    Attributes:
        rows: The prospects, the smallest numbers first.
        needed: What it takes from the first of them.
        to_find_a_part: Number of people with which a model that holds `A_PART` of the facts is found, with the controls
            at hand; None if no number is enough.
        margin: The rule's margin.
    """

    rows: tuple[Prospect, ...]
    needed: Needed
    to_find_a_part: int | None
    margin: float

    def table(self) -> pd.DataFrame:
        """Return the prospects as a table, one row each, with the columns of `Prospect`."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def sentences(self) -> list[str]:
        """Return what the plan says in words."""
        first = self.rows[0]
        found = (
            f"{first.smallest_share:.0%} of the facts or more are"
            if first.smallest_share is not None
            else "not even all of the facts are"
        )
        return [
            f"With {_counted(first.people, 'group')}, {_counted(first.facts, 'fact')} and "
            f"{_counted(first.controls, 'control')}, {found} found with {POWER:.0%} power, and a model that knows "
            f"nothing has an upper end of {first.high:.2f} (median).",
            f"To find a model that holds {A_PART:.0%} of the facts takes {self.to_find_a_part} groups."
            if self.to_find_a_part is not None
            else f"A model that holds {A_PART:.0%} of the facts is not found with any number of groups.",
            self.needed.text,
            "A plan assumes attacks that take hold and a model that keeps its utility. Its spread is that of the "
            "built-in models, where no run is given.",
        ]


def plan(
    rule: Rule,
    *,
    people: int,
    facts: int,
    controls: int = 1,
    spread: Spread | None = None,
) -> Plan:
    """Plan a verdict before anything is run.

    Args:
        rule: The rule with its margin, scale and `run_sd`.
        people: Number of people (groups of forget facts) at hand; at least 2. Facts without groups count as one each.
        facts: Number of forget facts at hand.
        controls: Number of controls at hand; at least 1.
        spread: Spread of the residuals; None takes that of the built-in models.

    Returns:
        Prospects for 1, 2, 4 and 8 times as many people with 1, 2, 4 and more controls.

    Raises:
        InputError: There are fewer than 2 people, fewer facts than people, or no control.

    Examples:
        >>> from dissect.verdicts.rule import frozen_rule
        >>> planned = plan(frozen_rule(), people=20, facts=120)
        >>> planned.rows[0].people, planned.rows[0].controls
        (20, 1)
        >>> planned.rows[-1].margin_met < planned.rows[0].margin_met
        True
    """
    _check(people, facts, controls)
    spread = spread or shipped(rule)
    numbers = sorted({controls, *(n for n in (2, 4) if n > controls)})
    rows = tuple(
        prospect(spread, rule, people=people * times, facts=facts * times, controls=n)
        for times in (1, 2, 4, 8)
        for n in numbers
    )
    return Plan(
        rows,
        needed(spread, rule, people=people, facts=facts, controls=controls),
        _smallest(
            lambda n: is_found(A_PART, spread, rule, people=n, facts=round(n * facts / people), controls=controls),
            people,
            MOST_PEOPLE,
        ),
        rule.margin,
    )


def needed_for(results: Iterable[StressResult], rule: Rule) -> Needed:
    """Say what it takes to decide, from the spread of a run's own results.

    The people of the plan vary as those of the run do. Where the model knows part of the facts, this includes the
    spread of what it knows, and the numbers are too high rather than too low.

    Args:
        results: The results of a verdict, such as `Verdict.results`; those of the rule's tests count.
        rule: The rule that is applied, such as `Verdict.rule`.

    Returns:
        What a model without the knowledge takes to be called erased.

    Raises:
        InputError: No test of the rule has a control and two groups.

    Examples:
        >>> from dissect import load_verdict
        >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
        >>> needed_for(found.results, found.rule).text  # doctest: +SKIP
        '...'
    """
    results = [result for result in results if any(entry.test == result.test for entry in rule.tests)]
    spread, sizes = _measured(results, rule)
    used = [found for found in residuals_of(results, rule).values() if found.rho is not None]
    runs = run_spread(used, rule.run_sd)
    controls = max(1, runs.n_controls)
    rule = replace(rule, run_sd=runs.sd / math.sqrt(_of_controls(controls)))
    return needed(spread, rule, people=len(sizes), facts=int(sizes.sum()), controls=controls)


def spread_of(results: Iterable[StressResult], rule: Rule) -> Spread:
    """Measure how the residuals of a rule's entries vary over people and facts, from results with a control.

    rho is a ratio of means, so a fact counts with (unlearned - control - rho (base - control)) / mean(base - control),
    the strongest variant each. Between and within are the components of a one-way analysis of variance by the method of
    moments, for groups of unequal size; negative eigenvalues of `between` are set to 0.

    Args:
        results: Results of the rule's tests, of one case.
        rule: The rule with its entries.

    Returns:
        The spread of the entries that have a control, in the order of the rule.

    Raises:
        InputError: No test of the rule has a control and two groups.
    """
    return _measured(results, rule)[0]


def shipped(rule: Rule) -> Spread:
    """Return the spread of the built-in models for a rule's entries.

    Args:
        rule: The rule with its entries.

    Returns:
        The spread; an entry that was not measured varies as the first one of the same measure, apart from it.
    """
    names = [str(entry) for entry in rule.tests]
    like = [name if name in _ENTRIES else _stand_in(entry) for name, entry in zip(names, rule.tests, strict=True)]
    index = [_ENTRIES.index(name) for name in like]
    pick = np.ix_(index, index)
    return Spread(_BETWEEN[pick].copy(), _WITHIN[pick].copy(), _STRENGTH[index].copy())


def prospect(spread: Spread, rule: Rule, *, people: int, facts: int, controls: int = 1) -> Prospect:
    """Compute what a verdict can decide.

    Args:
        spread: Spread of the residuals.
        rule: The rule with its margin, scale and `run_sd`.
        people: Number of people; at least 2.
        facts: Number of facts.
        controls: Number of controls; at least 1.

    Returns:
        The prospect.

    Raises:
        InputError: There are fewer than 2 people, fewer facts than people, or no control.
    """
    _check(people, facts, controls)
    high = ends(spread, rule, people=people, facts=facts, controls=controls, share=0.0)[1]

    smallest = _smallest(
        lambda step: is_found(step * _STEP, spread, rule, people=people, facts=facts, controls=controls),
        1,
        round(1 / _STEP),
    )
    return Prospect(
        people=people,
        facts=facts,
        controls=controls,
        high=float(np.median(high)),
        margin_met=float(np.quantile(high, POWER)),
        power=float((high < rule.margin).mean()),
        smallest_share=None if smallest is None else smallest * _STEP,
    )


def is_found(share: float, spread: Spread, rule: Rule, *, people: int, facts: int, controls: int) -> bool:
    """Return whether a model that holds a share of the facts is called suppressed with the plan's power."""
    low = ends(spread, rule, people=people, facts=facts, controls=controls, share=share)[0]
    return float((low > rule.suppressed_above).mean()) >= POWER


def needed(spread: Spread, rule: Rule, *, people: int, facts: int, controls: int = 1) -> Needed:
    """Find how many people or controls it takes to call a model without the knowledge erased.

    Args:
        spread: Spread of the residuals.
        rule: The rule with its margin, scale and `run_sd`.
        people: Number of people at hand; at least 2.
        facts: Number of facts at hand; more people come with as many facts each.
        controls: Number of controls at hand; at least 1.

    Returns:
        The numbers.

    Raises:
        InputError: There are fewer than 2 people, fewer facts than people, or no control.
    """
    _check(people, facts, controls)
    each = facts / people

    def high(n_people: int, n_controls: int) -> Float[np.ndarray, " model"]:
        n_facts = round(n_people * each)
        return ends(spread, rule, people=n_people, facts=n_facts, controls=n_controls, share=0.0)[1]

    def is_enough(n_controls: int, n_people: int) -> bool:
        return float((high(n_people, n_controls) < rule.margin).mean()) >= POWER

    more_people = _smallest(partial(is_enough, controls), people, MOST_PEOPLE)
    more_controls = _smallest(lambda n: is_enough(n, people), controls, MOST_CONTROLS)
    together = None
    for n in (2, 4, 8, MOST_CONTROLS):
        if n > controls and (found := _smallest(partial(is_enough, n), people, MOST_PEOPLE)):
            together = (found, n)
            break
    text = _text(
        rule,
        (people, facts, controls),
        more_people,
        more_controls,
        together,
        reached=[float(np.median(high(MOST_PEOPLE, n))) for n in (controls, max(4, controls), MOST_CONTROLS)],
    )
    return Needed(
        people=more_people,
        facts=None if more_people is None else round(more_people * each),
        controls=more_controls,
        together=together,
        text=text,
    )


def ends(
    spread: Spread, rule: Rule, *, people: int, facts: int, controls: int, share: float
) -> tuple[Float[np.ndarray, " model"], Float[np.ndarray, " model"]]:
    """Simulate the lower and the upper end of the scores of models that hold a share of the facts.

    Who is known is known with all facts, so that the share varies over people.

    Args:
        spread: Spread of the residuals.
        rule: The rule with its scale and `run_sd`.
        people: Number of people.
        facts: Number of facts.
        controls: Number of controls.
        share: Share of the people that the model knows, 0 to 1.

    Returns:
        Lower and upper ends of the 95 % intervals, one per simulated model.
    """
    of_control = _of_controls(controls)
    knows = rule.ceiling * spread.strength
    over_people = of_control * spread.between + share * (1 - share) * np.outer(knows, knows)
    root = _root(over_people / people + of_control * spread.within / facts)
    run_spread = RunSpread(rule.run_sd * math.sqrt(of_control), PRIOR_DF + controls - 1, controls)
    models, runs, draws = _numbers(len(root))
    rho = share * knows + models @ root.T + run_spread.sd * runs[:, None]
    # The bootstrap over n groups has (n - 1) / n of the variance of a mean of n.
    around = math.sqrt((people - 1) / people) * draws @ root.T
    largest = rho[:, None, 0] + around[None, :, 0]
    for entry in range(1, len(root)):
        np.maximum(largest, rho[:, None, entry] + around[None, :, entry], out=largest)
    largest += run_spread.deviates(_DRAWS)
    low, high = np.quantile(largest, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return rule.scaled(low), rule.scaled(high)


@lru_cache(maxsize=4)
def _numbers(
    n_entries: int,
) -> tuple[
    Float[np.ndarray, "model entry"],
    Float[np.ndarray, " model"],
    Float[np.ndarray, "draw entry"],
]:
    """Return the standard normal numbers of every simulation: of models, their runs, and the draws over people."""
    generator = np.random.default_rng(1)  # not that of the runs' deviates
    models, runs, draws = (generator.standard_normal(n) for n in ((_MODELS, n_entries), _MODELS, (_DRAWS, n_entries)))
    return models, runs, draws


def _root(covariance: Float[np.ndarray, "entry entry"]) -> Float[np.ndarray, "entry entry"]:
    """Return the symmetric square root of a covariance; negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


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


def _text(
    rule: Rule,
    at_hand: tuple[int, int, int],
    more_people: int | None,
    more_controls: int | None,
    together: tuple[int, int] | None,
    *,
    reached: Sequence[float],
) -> str:
    people, facts, controls = at_hand
    each = facts / people
    if more_people == people:
        return (
            f"{_counted(people, 'group')} and {_counted(controls, 'control')} are enough: a model that knows nothing "
            f"is called erased (upper end below {rule.margin:.2f}) with {POWER:.0%} power."
        )
    goal = f"To call a model that knows nothing erased (upper end below {rule.margin:.2f}) with {POWER:.0%} power"
    ways = []
    if more_people is not None:
        ways.append(f"{more_people} groups ({round(more_people * each)} facts) with {_counted(controls, 'control')}")
    if more_controls is not None:
        ways.append(f"{more_controls} controls with {_counted(people, 'group')}")
    if together is not None and more_controls is None:
        ways.append(f"{together[0]} groups ({round(together[0] * each)} facts) with {together[1]} controls")
    if more_people is not None:
        return f"{goal}, it takes {', or '.join(ways)}."
    alone = (
        f"The margin of {rule.margin:.2f} cannot be reached by more groups alone: two training runs differ by "
        f"{rule.run_sd:.3f} (run_sd), so that even {MOST_PEOPLE} groups with {_counted(controls, 'control')} give an "
        f"upper end of {reached[0]:.2f} (median)."
    )
    if ways:
        return f"{alone} {goal}, it takes {', or '.join(ways)}."
    return (
        f"{alone} Nor by more controls: {max(4, controls)} give {reached[1]:.2f}, {MOST_CONTROLS} give "
        f"{reached[2]:.2f}. Set `margin` to what these give, or use attacks whose results vary less between runs."
    )


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _check(people: int, facts: int, controls: int) -> None:
    check_at_least("people", people, 2)
    check_at_least("controls", controls, 1)
    if facts < people:
        raise InputError(f"`facts` must be at least the number of people, {people}, got {facts}")


def _of_controls(controls: int) -> float:
    """Return the variance of a residual against the mean of several controls, divided by that against one control."""
    return (1 + 1 / controls) / 2


def _measured(results: Iterable[StressResult], rule: Rule) -> tuple[Spread, Int[np.ndarray, " group"]]:
    """Return the spread, and the number of facts of every group."""
    by_test = {result.test: result for result in results}
    found = {
        entry: contributions
        for entry in rule.tests
        if entry.test in by_test and (contributions := _contributions(by_test[entry.test], entry.measure)) is not None
    }
    if not found:
        raise InputError("`results` must hold a test of the rule with a control, and there is none")
    first, *_ = found.values()
    table = pd.concat([entry.values for entry in found.values()], axis=1).dropna()
    group = clusters(first.groups.loc[table.index].tolist())
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise InputError(f"`results` must be of at least 2 groups, got {len(sizes)}")
    between, within = components(table.to_numpy(dtype=np.float64), group)
    against_one = 1 / _of_controls(first.n_controls)
    rho = np.array([entry.rho for entry in found.values()])
    strength = rho / rho.max() if rho.max() > rule.ceiling / 4 else shipped(replace(rule, tests=tuple(found))).strength
    return Spread(between * against_one, within * against_one, np.clip(strength, 0.0, 1.0)), sizes


def components(
    values: Float[np.ndarray, "fact entry"], group: Int[np.ndarray, " fact"]
) -> tuple[Float[np.ndarray, "entry entry"], Float[np.ndarray, "entry entry"]]:
    """Estimate the covariances between and within groups by the method of moments.

    Args:
        values: Values of every fact.
        group: Number of each fact's group, from 0.

    Returns:
        Covariance of the groups' true means, without negative eigenvalues, and covariance within a group; 0 within
        where every group has one fact.
    """
    sizes = np.bincount(group).astype(np.float64)
    n, n_groups = len(values), len(sizes)
    means = np.stack([np.bincount(group, weights=column) for column in values.T], axis=1) / sizes[:, None]
    apart = means - values.mean(0)
    inside = values - means[group]
    over_groups = (apart * sizes[:, None]).T @ apart / (n_groups - 1)
    within = inside.T @ inside / (n - n_groups) if n > n_groups else np.zeros_like(over_groups)
    typical = (n - (sizes**2).sum() / n) / (n_groups - 1)
    root = _root((over_groups - within) / typical)
    return root @ root, within


@dataclass(frozen=True, eq=False)
class _Contributions:
    """What every fact adds to the residual of one entry.

    Attributes:
        values: What a fact adds, in units of rho, around the residual; by index of the fact.
        rho: The residual.
        groups: Group of every fact.
        n_controls: Number of controls.
    """

    values: "pd.Series[float]"
    rho: float
    groups: "pd.Series[str]"
    n_controls: int


def _contributions(result: StressResult, measure: str | None) -> _Contributions | None:
    """Return what every fact adds to a residual; None without a control, or where the base knows no more than it."""
    frame = result.frame
    here = frame[frame["measure"] == (measure or result.measure)]
    tables = {
        str(role): rows.pivot(index="example_index", columns="variant", values="value")
        for role, rows in here.groupby("role")
    }
    controls = [tables[role] for role in controls_in(tables)]
    if not controls:
        return None

    def best(table: pd.DataFrame, variants: Sequence[str]) -> "pd.Series[float]":
        return table[table[list(variants)].mean().idxmax()]

    def mean_of_controls(variants: Sequence[str]) -> "pd.Series[float]":
        return pd.concat([best(table, variants) for table in controls], axis=1).mean(axis=1, skipna=False)

    attacked = [name for name in tables["unlearned"].columns if name != PLAIN] or [PLAIN]
    before = [PLAIN] if PLAIN in tables["base"].columns else attacked
    gap = best(tables["base"], before) - mean_of_controls(before)
    ours = best(tables["unlearned"], attacked) - mean_of_controls(attacked)
    if not gap.mean() > 0:
        return None
    rho = float(ours.mean() / gap.mean())
    groups = here.drop_duplicates("example_index").set_index("example_index")["group"]
    return _Contributions((ours - rho * gap) / gap.mean(), rho, groups, len(controls))


def _stand_in(entry: RuleEntry) -> str:
    """Return the measured entry that an unmeasured one is taken to vary like: that of the same measure."""
    return next((name for name in _ENTRIES if RuleEntry.parse(name).measure == entry.measure), _ENTRIES[0])
