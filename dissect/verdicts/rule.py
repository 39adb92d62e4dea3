"""The rule that turns residuals into a label: a few numbers, fitted once and frozen in `verdict_rule.json`.

    score = clip((max_e rho_e - floor) / (ceiling - floor), 0, 1)

The maximum is over the entries e of the rule that have a residual; an entry is a test with its deciding measure, or
with another measure. The largest counts because one attack that brings knowledge back is enough. The score's interval
covers people (bootstrap) and training runs (`dissect.verdicts.spread`). The largest of several residuals around zero
lies above zero, and so does the largest in every bootstrap draw. The lower end allows for this choice: it is lower than
the largest residual by as much as, in 97.5 % of the draws, no residual exceeds its own value. The upper end is that of
the largest residual in every draw, which is rather too high than too low. The first condition that holds gives the
label:

    not unlearned   rho of the answers' probability without attack: lower end above `not_unlearned_above`
    suppressed      score: lower end above `suppressed_above`
    erased          score: upper end below `margin`; all needed tests were run, two attacks took hold, no test that only
                    reads finds knowledge, the answers are not avoided (`dissect.verdicts.signs`), and utility is kept
    inconclusive    otherwise

There are two rules, with the same conditions and with entries and numbers of their own. With a control, relearning on
facts about other subjects counts, net of what it does to the control. Without one, relearning on other forgotten facts
and deranged relearning (`dissect.stress.deranged`) count, which leave a model without the knowledge at chance if the
answers could be exchanged between questions.

The numbers come from `python -m analyses.verdict_benchmark`: models whose knowledge is known by construction, with
seeds that are used for nothing else. The margin alone is not fitted. It says how much knowledge matters, which no
measurement can tell, and it is chosen before anything is measured.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

import numpy as np

from dissect.stress.core.result import Residual, StressResult
from dissect.verdicts.signs import WITHOUT_ATTACK, Signs, read_signs
from dissect.verdicts.spread import RunSpread, run_spread
from unlearning.common.bootstrap import LEVEL
from unlearning.common.errors import InputError

Label = Literal["not unlearned", "suppressed", "erased", "inconclusive"]

FILE = "verdict_rule.json"

MARGIN = 0.1
"""Default share of the base's knowledge below which a remainder does not matter."""

Values = TypeVar("Values", np.float64, np.ndarray)

_OLD_NAMES = {
    "nothing": "floor",
    "everything": "ceiling",
    "spread": "run_sd",
    "expressed_above": "not_unlearned_above",
    "erased_below": "margin",
}
"""Current names of a rule's numbers by their names in files of earlier versions."""


@dataclass(frozen=True)
class RuleEntry:
    """A test whose residual counts, by its deciding measure or by another one.

    Attributes:
        test: Name of the test.
        measure: Name of the measure; None for the measure that decides the test.
    """

    test: str
    measure: str | None = None

    @classmethod
    def parse(cls, text: str) -> "RuleEntry":
        """Return the entry written as `TEST` or `TEST:MEASURE`."""
        test, _, measure = text.partition(":")
        return cls(test, measure or None)

    def __str__(self) -> str:
        """Return the entry as `TEST` or `TEST:MEASURE`."""
        return self.test if self.measure is None else f"{self.test}:{self.measure}"


@dataclass(frozen=True)
class Rule:
    """The numbers that decide.

    Attributes:
        tests: The entries whose residuals count; none of the tests uses the base's weights or activations.
        needed: The entries without which no model is called erased.
        floor: Largest residual of a model without the knowledge.
        ceiling: Largest residual of a model that holds all of the knowledge.
        run_sd: Standard deviation, over orders of the training texts, of the residual of a model without the knowledge
            against one control (against the floor, without a control), beyond what people contribute. (In the rule that
            was fitted on 2026-11-22 people are contained in it, which makes it too large.)
        not_unlearned_above: rho of the answers' probability above which the model is called not unlearned.
        suppressed_above: Score above which the model is called suppressed.
        margin: Score below which the model is called erased: the share of the base's knowledge that may be left. It was
            fitted in rules of earlier versions.
        utility_floor: Share of the base's right answers to retain questions that an unlearned model must keep.
        fitted: Where the numbers come from: command, families, date, number of models.
        reference: Scores of the models that the rule was reported on, by their kind.
    """

    tests: tuple[RuleEntry, ...]
    needed: tuple[RuleEntry, ...]
    floor: float
    ceiling: float
    run_sd: float
    not_unlearned_above: float
    suppressed_above: float
    margin: float
    utility_floor: float
    fitted: Mapping[str, Any]
    reference: Mapping[str, list[float]]

    @property
    def sha256(self) -> str:
        """Hash of the numbers that decide."""
        deciding = {name: value for name, value in self.record().items() if name not in ("fitted", "reference")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the rule as plain data, as its file holds it; `read_rule` reads it."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return record | {name: [str(entry) for entry in record[name]] for name in ("tests", "needed")}

    def scaled(self, largest: Values) -> Values:
        """Return largest residuals on the scale of the score, from 0 to 1."""
        return np.clip((largest - self.floor) / (self.ceiling - self.floor), 0.0, 1.0)


@dataclass(frozen=True)
class Rules:
    """The two rules.

    Attributes:
        with_control: The rule for cases with a control.
        without_control: The rule for cases without one.
    """

    with_control: Rule
    without_control: Rule

    def record(self) -> dict[str, Any]:
        """Return the rules as plain data, as their file holds them."""
        return {field.name: getattr(self, field.name).record() for field in fields(self)}


@cache
def frozen_rules() -> Rules:
    """Return the rules that are shipped with the package."""
    records = json.loads(files("dissect.verdicts").joinpath(FILE).read_text(encoding="utf-8"))
    return Rules(**{name: read_rule(record) for name, record in records.items()})


def frozen_rule(*, has_control: bool = True) -> Rule:
    """Return the rule that is shipped with the package.

    Args:
        has_control: Whether there is a control.

    Returns:
        The rule for cases with a control, or the one for cases without.
    """
    rules = frozen_rules()
    return rules.with_control if has_control else rules.without_control


def read_rule(record: Mapping[str, Any]) -> Rule:
    """Return the rule that `Rule.record` gave, in this or an earlier version."""
    record = {_OLD_NAMES.get(name, name): value for name, value in record.items()}
    return Rule(
        **{field.name: record[field.name] for field in fields(Rule)}
        | {name: tuple(map(RuleEntry.parse, record[name])) for name in ("tests", "needed")}
    )


def with_margin(rule: Rule, margin: float | None) -> Rule:
    """Return the rule with another margin.

    Args:
        rule: The rule.
        margin: The margin; None keeps the rule's own.

    Returns:
        The rule with this margin.

    Raises:
        InputError: The margin is not between 0 and 1.
    """
    if margin is None:
        return rule
    check_margin(margin)
    return replace(rule, margin=margin)


def check_margin(margin: float) -> None:
    """Check that a margin is a share of the base's knowledge.

    Args:
        margin: The margin.

    Raises:
        InputError: The margin is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise InputError(
            f"`margin` must be above 0 and below 1, got {margin:g}. Give the share of the base's knowledge that may be "
            "left in a model that is called erased, such as 0.1"
        )


@dataclass(frozen=True)
class Score:
    """Residual knowledge, from 0 (none) to 1 (all of the base's), with its 95 % interval.

    Attributes:
        value: The score; None if no entry of the rule has a residual.
        low: Lower end of the interval; None if there is no interval.
        high: Upper end of the interval; None if there is no interval.
        used: The entries of the rule that have a residual.
        missing: The entries of the rule that have no residual.
        spread: The spread between training runs that the interval covers; None if there is no interval, or in runs of
            earlier versions.
    """

    value: float | None
    low: float | None
    high: float | None
    used: tuple[RuleEntry, ...]
    missing: tuple[RuleEntry, ...]
    spread: RunSpread | None = None


@dataclass(frozen=True)
class Utility:
    """How much of the knowledge that was to stay is left.

    Attributes:
        share: Share of the base's right answers to retain questions, teacher-forced, that the unlearned model also
            gives.
        n: Number of retain questions that the base answers.
        collapsed: Whether the share is below the rule's `utility_floor`.
    """

    share: float
    n: int
    collapsed: bool


def residuals_of(results: Iterable[StressResult], rule: Rule) -> dict[str, Residual]:
    """Return the residual of every test, and of every entry of the rule that names a measure.

    Args:
        results: Results of the tests.
        rule: The rule with its entries.

    Returns:
        Residuals by test, such as `relearn_disjoint`, or by test and measure, such as `relearn_disjoint:accuracy`.
    """
    found = {}
    for result in results:
        found[result.test] = result.residual()
        for entry in rule.tests:
            if entry.measure is not None and entry.test == result.test:
                found[str(entry)] = result.residual(entry.measure)
    return found


def residual_knowledge(found: Mapping[str, Residual], rule: Rule) -> Score:
    """Return the largest residual of the rule's entries, on the rule's scale.

    The upper end is over bootstrap draws: in every draw the largest residual is taken, and a deviate of the spread
    between training runs is added. The lower end is simultaneous for all residuals: it allows for the largest excess
    of a residual over its own value, in every draw, with the same deviates.

    Args:
        found: Residuals as `residuals_of` returns them, of tests of one case, which share their draws.
        rule: The rule with its entries and scale.

    Returns:
        The score with its interval.
    """
    used = {entry: found[str(entry)] for entry in rule.tests if str(entry) in found}
    used = {entry: residual for entry, residual in used.items() if residual.rho is not None}
    missing = tuple(entry for entry in rule.tests if entry not in used)
    if not used:
        return Score(None, None, None, (), missing)
    rhos = np.array([residual.rho for residual in used.values()], dtype=np.float64)
    value = float(rule.scaled(rhos.max()))
    draws = [residual.draws for residual in used.values() if residual.draws is not None]
    if len(draws) < len(used) or any(residual.low is None for residual in used.values()):
        return Score(value, None, None, tuple(used), missing)
    with warnings.catch_warnings():
        # A draw of few people may hold none whose residual is defined: it stays NaN, and is left out below.
        warnings.filterwarnings("ignore", "All-NaN")
        largest = np.nanmax(draws, axis=0)
        excess = np.nanmax([one for residual in used.values() if (one := residual.excess) is not None], axis=0)
    spread = run_spread(used.values(), rule.run_sd)
    over_runs = spread.deviates(len(largest))
    high = np.nanquantile(largest + over_runs, (1 + LEVEL) / 2)
    low = rhos.max() - max(float(np.nanquantile(excess + over_runs, (1 + LEVEL) / 2)), 0.0)
    return Score(value, float(rule.scaled(low)), float(rule.scaled(high)), tuple(used), missing, spread)


def decide(
    score: Score,
    without_attack: Residual,
    rule: Rule,
    *,
    utility: float | None,
    signs: Signs | None = None,
) -> Label:
    """Return the label.

    Args:
        score: Residual knowledge.
        without_attack: Residual of the answers' probability without attack.
        rule: The rule with its bounds.
        utility: Share of the base's right answers to retain questions that the unlearned model also gives; None if
            there are no retain questions.
        signs: What decides about *erased* beside the score; None where only residuals were kept, which then decide
            alone.

    Returns:
        The label of the first condition that holds (see the module's docstring).
    """
    if without_attack.low is not None and without_attack.low > rule.not_unlearned_above:
        return "not unlearned"
    if score.low is None or score.high is None:
        return "inconclusive"
    if score.low > rule.suppressed_above:
        return "suppressed"
    collapsed = utility is not None and utility < rule.utility_floor
    allowed = (signs is None or signs.allow_erased) and not set(rule.needed) & set(score.missing)
    if score.high < rule.margin and allowed and not collapsed:
        return "erased"
    return "inconclusive"


def judge(results: Iterable[StressResult], rule: Rule, *, utility: float | None) -> tuple[Label, Score, Signs]:
    """Return the label, the score and the signs of the results of all tests.

    Args:
        results: Results of the tests. `without_attack` and the rule's tests give the score, all tests the signs.
        rule: The rule with its entries and bounds.
        utility: Share of the base's right answers to retain questions that the unlearned model also gives; None if
            there are no retain questions.

    Returns:
        The label, the score and the signs.
    """
    results = list(results)
    counted = [result for result in results if result.test in {WITHOUT_ATTACK, *(entry.test for entry in rule.tests)}]
    found = residuals_of(counted, rule)
    score = residual_knowledge(found, rule)
    signs = read_signs(results, score.spread or run_spread([], rule.run_sd))
    label = decide(score, found[WITHOUT_ATTACK], rule, utility=utility, signs=signs)
    return label, score, signs
