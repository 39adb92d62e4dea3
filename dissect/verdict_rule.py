"""The rule that turns residuals into a verdict: a few numbers, fitted once and frozen in `verdict_rule.json`.

    score = sum_t w_t clip(rho_t, 0, 1) / sum_t w_t      over the tests t of the rule that have a residual

and, in this order:

    not unlearned   the answers' probability: lower end of rho above `expressed_above`
    suppressed      lower end of the score above `suppressed_above`
    erased          upper end of the score below `erased_below`, and utility is there
    inconclusive    anything else

The numbers come from `python -m analyses.verdict_benchmark`, from models whose truth is known by construction and whose
seeds were used for nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from dissect.stress.result import Residual
from unlearning.intervals import LEVEL

Word = Literal["not unlearned", "suppressed", "erased", "inconclusive"]

FILE = "verdict_rule.json"


@dataclass(frozen=True)
class Rule:
    """The frozen numbers.

    Attributes:
        weights: of each test's residual, by the test's name.
        expressed_above: rho of the answers' probability above which nothing was unlearned.
        suppressed_above: score above which knowledge is left.
        erased_below: score below which none is.
        utility_floor: share of the base's retain answers that an unlearned model must still give.
        fitted: where the numbers come from: command, seeds, date, number of models.
        reference: scores of the models that the rule was reported on, by what they are.
    """

    weights: Mapping[str, float]
    expressed_above: float
    suppressed_above: float
    erased_below: float
    utility_floor: float
    fitted: Mapping[str, Any]
    reference: Mapping[str, list[float]]

    @property
    def sha256(self) -> str:
        """Hash of the numbers that decide."""
        parts = [dict(self.weights), self.expressed_above, self.suppressed_above, self.erased_below, self.utility_floor]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def frozen_rule() -> Rule:
    """The rule that ships."""
    return read_rule(json.loads(files("dissect").joinpath(FILE).read_text(encoding="utf-8")))


def read_rule(record: Mapping[str, Any]) -> Rule:
    """A rule from the content of its file."""
    return Rule(**{name: record[name] for name in Rule.__dataclass_fields__})


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


def residual_knowledge(found: Mapping[str, Residual], rule: Rule) -> Score:
    """The weighted mean of the residuals of the rule's tests, each clipped to [0, 1]; draw by draw for the interval.

    Args:
        found: residuals by test; of tests of one case, whose draws belong together.
        rule: names the tests and their weights.
    """
    weighed = {name: weight for name, weight in rule.weights.items() if weight > 0}
    used = {name: found[name] for name in weighed if name in found and found[name].rho is not None}
    missing = tuple(name for name in weighed if name not in used)
    if not used:
        return Score(None, None, None, (), missing)
    total = sum(weighed[name] for name in used)
    value = sum(weighed[name] * float(np.clip(residual.rho or 0.0, 0, 1)) for name, residual in used.items()) / total
    parts = [weighed[name] * np.clip(r.draws, 0, 1) for name, r in used.items() if r.draws is not None]
    if len(parts) < len(used):
        return Score(value, None, None, tuple(used), missing)
    draws = np.sum(parts, axis=0) / total
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(value, float(low), float(high), tuple(used), missing)


def decide(score: Score, expressed: Residual, rule: Rule, *, utility: float | None) -> Word:
    """The verdict's word.

    Args:
        score: residual knowledge.
        expressed: the residual of the answers' probability, unattacked.
        rule: with its bounds.
        utility: share of the base's retain answers that the unlearned model still gives; None where none was asked.
    """
    if expressed.low is not None and expressed.low > rule.expressed_above:
        return "not unlearned"
    if score.low is None or score.high is None:
        return "inconclusive"
    if score.low > rule.suppressed_above:
        return "suppressed"
    collapsed = utility is not None and utility < rule.utility_floor
    if score.high < rule.erased_below and not collapsed:
        return "erased"
    return "inconclusive"
