"""What residuals are for people whom a model knows and for others, and how they vary: the numbers that a plan rests on.

The numbers that ship (`spread.json`) were measured on models whose knowledge is known person by person, the
calibration families of `analyses.verdict_benchmark`: with 24 people and six facts each, many more than the built-in
models, and with models that hold a part of the facts, of which there are none among the built-in ones. The file names
command, date and families. They are models of 0.7 million parameters and facts of one form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float

from dissect.verdicts.rule import Rule, RuleEntry

FILE = "spread.json"


@dataclass(frozen=True, eq=False)
class Population:
    """Models that differ in how much they know, in units of rho. A simulated model is one of them.

    Attributes:
        shares: Shares of the people that models held on which `unknown` was measured, increasing, [share].
        known: Mean residual over people whom a model knows, [model, entry].
        unknown: Mean residual over people whom a model does not know, by the share that it holds, [model, share,
            entry].
        between: Covariance over people of the entries' means of one person, [entry, entry].
        within: Covariance over the facts of one person, [entry, entry].
    """

    shares: Float[np.ndarray, " share"]
    known: Float[np.ndarray, "model entry"]
    unknown: Float[np.ndarray, "model share entry"]
    between: Float[np.ndarray, "entry entry"]
    within: Float[np.ndarray, "entry entry"]

    def unknown_at(self, share: float) -> Float[np.ndarray, "model entry"]:
        """Return the residual of unknown people in models that know a share of all, interpolated."""
        return np.array(
            [[np.interp(share, self.shares, of_entry) for of_entry in of_model.T] for of_model in self.unknown]
        )

    def of_entries(self, index: Sequence[int]) -> "Population":
        """Return the population of some entries, by their numbers; one entry may stand for several."""
        chosen = list(index)
        pick = np.ix_(chosen, chosen)
        return Population(
            self.shares, self.known[:, chosen], self.unknown[:, :, chosen], self.between[pick], self.within[pick]
        )

    def record(self) -> dict[str, list[Any]]:
        """Return the population as plain data, to three decimals."""
        return {field.name: np.round(getattr(self, field.name), 3).tolist() for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Populations:
    """The two kinds of models that a plan is about.

    Attributes:
        plain: Models that score like a control for people whom they do not know.
        avoiding: Models that were unlearned on people whom they know and others, by a method (NPO, DPO) that pushes all
            answers below chance. What it does to the others counts against what it left of the known ones.
    """

    plain: Population
    avoiding: Population

    def record(self) -> dict[str, Any]:
        """Return both as plain data."""
        return {field.name: getattr(self, field.name).record() for field in fields(self)}


def shipped(rule: Rule, *, has_control: bool = True) -> Populations:
    """Return the populations of the calibration models for a rule's entries.

    Args:
        rule: The rule with its entries.
        has_control: Whether residuals are relative to a control, or to chance.

    Returns:
        The populations; an entry that was not measured is taken to vary as the first one of the same measure.
    """
    section = _shipped()[section_name(has_control=has_control)]
    index = [_place(entry, section["names"]) for entry in rule.tests]
    return Populations(*(_read(section[field.name]).of_entries(index) for field in fields(Populations)))


def section_name(*, has_control: bool) -> str:
    """Return the key of the file under which residuals with or without a control stand."""
    return "with_control" if has_control else "without_control"


def measured_on() -> Mapping[str, Any]:
    """Return where the shipped numbers come from: command, date, families and number of models."""
    return dict(_shipped()["measured"])


@cache
def _shipped() -> dict[str, Any]:
    return dict(json.loads(files("dissect.verdicts.planning").joinpath(FILE).read_text(encoding="utf-8")))


def _read(record: Mapping[str, Any]) -> Population:
    return Population(**{name: np.array(value, dtype=np.float64) for name, value in record.items()})


def _place(entry: RuleEntry, names: Sequence[str]) -> int:
    """Return the number of the entry, or of the measured one that stands in for it: the first of the same measure."""
    if str(entry) in names:
        return names.index(str(entry))
    return next((place for place, name in enumerate(names) if RuleEntry.parse(name).measure == entry.measure), 0)
