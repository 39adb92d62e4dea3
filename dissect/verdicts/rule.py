"""The rule that turns residuals into a verdict: a few numbers, fitted once and frozen in `verdict_rule.json`.

    score = clip((max_t rho_t - nothing) / (everything - nothing), 0, 1)

over the entries t of the rule that have a residual: tests, or single measures of tests (`relearn_disjoint:accuracy`).
One attack that brings knowledge back is enough. The largest of several residuals around zero is a little above it,
which `nothing` takes away. The score's interval is over people, by bootstrap, and over training runs: two models that
never knew, trained on the same texts in another order, differ by `spread` under the same attack. In this order:

    not unlearned   the answers' probability: lower end of rho above `not_unlearned_above`
    suppressed      lower end of the score above `suppressed_above`; without a never model, of the score above guessing
    erased          upper end of the score below `erased_below`, every needed test was run, and utility is there
    inconclusive    anything else

The numbers come from `python -m analyses.verdict_benchmark`, from models whose truth is known by construction and whose
seeds were used for nothing else.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

import numpy as np

from dissect.stress.core.result import Residual, StressResult
from unlearning.common.bootstrap import LEVEL

Word = Literal["not unlearned", "suppressed", "erased", "inconclusive"]

FILE = "verdict_rule.json"

Values = TypeVar("Values", np.float64, np.ndarray)


@dataclass(frozen=True)
class Rule:
    """The frozen numbers.

    Attributes:
        tests: whose residuals count, each with its deciding measure or, after a colon, with another; none of them puts
            anything of the base into the model.
        needed: those of them without which no model is called erased.
        nothing: largest residual of a model that never knew.
        everything: largest residual of a model that holds all of the knowledge.
        spread: standard deviation of the residual of a model that never knew, over the orders of its training texts.
        not_unlearned_above: rho of the answers' probability above which nothing was unlearned.
        suppressed_above: score above which knowledge is left.
        erased_below: score below which none is.
        utility_floor: share of the base's retain answers that an unlearned model must still give.
        fitted: where the numbers come from: command, seeds, date, number of models.
        reference: scores of the models that the rule was reported on, by what they are.
    """

    tests: tuple[str, ...]
    needed: tuple[str, ...]
    nothing: float
    everything: float
    spread: float
    not_unlearned_above: float
    suppressed_above: float
    erased_below: float
    utility_floor: float
    fitted: Mapping[str, Any]
    reference: Mapping[str, list[float]]

    @property
    def sha256(self) -> str:
        """Hash of the numbers that decide."""
        deciding = {name: value for name, value in asdict(self).items() if name not in ("fitted", "reference")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def scaled(self, largest: Values) -> Values:
        """Largest residuals as residual knowledge."""
        return np.clip((largest - self.nothing) / (self.everything - self.nothing), 0.0, 1.0)


@cache
def frozen_rule() -> Rule:
    """The rule that ships."""
    return read_rule(json.loads(files("dissect.verdicts").joinpath(FILE).read_text(encoding="utf-8")))


def read_rule(record: Mapping[str, Any]) -> Rule:
    """A rule from the content of its file."""
    if "expressed_above" in record:  # the name in files of earlier versions
        record = {**record, "not_unlearned_above": record["expressed_above"]}
    return Rule(
        **{name: record[name] for name in Rule.__dataclass_fields__}
        | {name: tuple(record[name]) for name in ("tests", "needed")}
    )


@dataclass(frozen=True)
class Score:
    """Residual knowledge, 0 (none) to 1 (all of the base's), with its 95 % interval.

    Attributes:
        value: None where no test of the rule has a residual.
        low: lower end.
        high: upper end.
        used: the tests that it is made of.
        missing: the tests of the rule that have no residual.
    """

    value: float | None
    low: float | None
    high: float | None
    used: tuple[str, ...]
    missing: tuple[str, ...]


def test_of(entry: str) -> str:
    """The test that an entry of the rule is about."""
    return entry.partition(":")[0]


def residuals_of(
    results: Iterable[StressResult], rule: Rule, *, guessing: Mapping[str, float] | None = None
) -> dict[str, Residual]:
    """The residual of every test by its name, and of every entry of the rule that names a measure.

    Args:
        results: of the tests.
        rule: with its entries.
        guessing: what its measures are without any knowledge, where that may be above chance; counts where results have
            no never model.
    """
    found = {}
    for result in results:
        if guessing is not None:
            floors = {name: max(floor, guessing.get(name, floor)) for name, floor in result.floors.items()}
            result = replace(result, floors=floors)
        found[result.test] = result.residual()
        for entry in rule.tests:
            if entry != test_of(entry) == result.test:
                found[entry] = result.residual(entry.partition(":")[2])
    return found


def residual_knowledge(found: Mapping[str, Residual], rule: Rule) -> Score:
    """The largest residual of the rule's tests, on the rule's scale; draw by draw for the interval, and with `spread`.

    Args:
        found: as `residuals_of` gives them; of tests of one case, whose draws belong together.
        rule: names the tests and the scale.
    """
    used = {name: found[name] for name in rule.tests if name in found and found[name].rho is not None}
    missing = tuple(name for name in rule.tests if name not in used)
    if not used:
        return Score(None, None, None, (), missing)
    value = float(rule.scaled(np.array([residual.rho for residual in used.values()], dtype=np.float64).max()))
    draws = [residual.draws for residual in used.values() if residual.draws is not None]
    if len(draws) < len(used) or any(residual.low is None for residual in used.values()):
        return Score(value, None, None, tuple(used), missing)
    over_people = np.nanmax(draws, axis=0)
    over_runs = over_people + rule.spread * np.random.default_rng(0).standard_normal(over_people.shape)
    low, high = np.nanquantile(rule.scaled(over_runs), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(value, float(low), float(high), tuple(used), missing)


def decide(
    score: Score, without_attack: Residual, rule: Rule, *, utility: float | None, above_guessing: Score | None = None
) -> Word:
    """The verdict's word.

    Args:
        score: residual knowledge.
        expressed: the residual of the answers' probability, unattacked.
        rule: with its bounds.
        utility: share of the base's retain answers that the unlearned model still gives; None where none was asked.
        above_guessing: the score against `dissect.stress.core.lexical_overlap`, without a control: chance
            is too little to call knowledge what is above it.
    """
    if without_attack.low is not None and without_attack.low > rule.not_unlearned_above:
        return "not unlearned"
    if score.low is None or score.high is None:
        return "inconclusive"
    found = (above_guessing or score).low
    if score.low > rule.suppressed_above and found is not None and found > rule.suppressed_above:
        return "suppressed"
    collapsed = utility is not None and utility < rule.utility_floor
    if score.high < rule.erased_below and not collapsed and not set(rule.needed) & set(score.missing):
        return "erased"
    return "inconclusive"


def judge(
    results: Iterable[StressResult], rule: Rule, *, utility: float | None, guessing: Mapping[str, float] | None
) -> tuple[Word, Score]:
    """The verdict's word and score.

    Args:
        results: `expressed` and the rule's tests among them.
        rule: with its bounds.
        utility: see `decide`.
        guessing: what measures are without any knowledge, where there is no never model; else None.
    """
    counted = [result for result in results if result.test in {"without_attack", *map(test_of, rule.tests)}]
    found = residuals_of(counted, rule)
    score = residual_knowledge(found, rule)
    above = score if guessing is None else residual_knowledge(residuals_of(counted, rule, guessing=guessing), rule)
    return decide(score, found["without_attack"], rule, utility=utility, above_guessing=above), score
