"""A verdict in sentences: what was found, what the finding rests on, and what would change the label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dissect.verdicts.facts import FALSE_DISCOVERIES, counts
from dissect.verdicts.rule import Label, Rule, RuleEntry, Score, Utility
from dissect.verdicts.signs import N_ATTACKS, Signs

MEANING: Mapping[Label, str] = {
    "not unlearned": "The model still gives the answers that were to be forgotten.",
    "suppressed": "The model no longer gives the answers, but the tests recover knowledge of them from it.",
    "erased": "The model no longer gives the answers, and holds less than {high:.2f} of the facts, 95 %, as far as "
    "these tests can tell.",
    "inconclusive": "The tests neither find knowledge of the answers nor rule it out.",
}
"""What each label says about the model; `high` is the upper end of the score."""

LARGER_BUDGET = {"quick": "standard", "standard": "full"}


@dataclass(frozen=True, eq=False)
class Findings:
    """What the sentences, the page and the printed tables of a verdict are made from.

    Attributes:
        label: The label.
        score: Residual knowledge with its interval.
        utility: How much of the retained knowledge is left; None without retain questions.
        signs: What decides about *erased* beside the score; None in runs of earlier versions.
        rule: The rule that was applied.
        evidence: One row per test, as `Verdict.evidence` returns it.
        has_control: Whether residuals are relative to a control; else to chance.
        not_run: Reasons why tests of the budget were not run, by test.
        decisive: Tests without any one of which the label would change.
        budget: Name of the budget.
        facts: One row per fact, as `Verdict.facts` returns it.
        needed: What it would take to decide, in a sentence; None if there is no plan.
        attacks: How every variant of every attack went, as `Verdict.attacks` returns it.
        outside: What the models have outside their parameters that no score depends on.
        strangers: Names of the language models whose guesses are the floor without a control.
    """

    label: Label
    score: Score
    utility: Utility | None
    signs: Signs | None
    rule: Rule
    evidence: pd.DataFrame
    has_control: bool
    not_run: Mapping[str, str]
    decisive: Sequence[str]
    budget: str
    facts: pd.DataFrame
    needed: str | None
    attacks: pd.DataFrame
    outside: Sequence[str] = ()
    strangers: Sequence[str] = ()


def sentences(found: Findings) -> list[str]:
    """Return the result in sentences, the most important first."""
    said = []
    utility, score = found.utility, found.score
    if utility is not None and utility.collapsed:
        said.append(
            f"Utility is lost: the model keeps only {_percent(utility.share)} of the base's right answers to "
            f"{utility.n} retain questions. It is broken rather than unlearned, and the following describes a broken "
            "model."
        )
    said.append(MEANING[found.label].format(high=0.0 if score.high is None else score.high))
    if score.value is not None:
        interval = "" if score.low is None else f" (95 % interval {score.low:.2f} to {score.high:.2f})"
        said.append(
            f"Residual knowledge is {score.value:.2f}{interval} on a scale from 0 ({_zero(found)}) to 1 (all of the "
            f"base's knowledge), measured by {_listed(_tests(score.used))}.{_runs(score)}"
        )
    attacked = found.evidence[found.evidence["level"] > 0]
    proven = attacked[attacked["low"].astype(float) > found.rule.suppressed_above]
    if len(proven):
        highest = proven[proven["level"] == proven["level"].max()]
        said.append(
            f"The highest evidence level reached is {highest['level'].iloc[0]}, {highest['claim'].iloc[0]} "
            f"({_listed(list(highest['test']))})."
        )
    said += _of_facts(found)
    if found.signs is not None:
        said += _of_signs(found, found.signs)
    if found.label == "erased":
        said.append(
            f"Up to {score.high:.2f} of what the base knows could still be there (upper end of the interval; the "
            f"margin, fixed beforehand, is {found.rule.margin:.2f}). Tests tried, in the budget `{found.budget}`: "
            f"{_listed(list(attacked['test']))}. An attack that was not tried may still recover knowledge."
        )
    if utility is not None and not utility.collapsed:
        said.append(
            f"The model keeps {_percent(utility.share)} of the base's right answers to {utility.n} retain questions."
        )
    if not found.has_control:
        said.append(_without_control(found))
    return said


def advice(found: Findings) -> list[str]:
    """Return what would change the label, or make it firmer."""
    said = []
    score, rule = found.score, found.rule
    if len(found.decisive) == 1:
        said.append(f"The label rests on {found.decisive[0]} alone; without it the label would change.")
    elif found.decisive:
        said.append(f"The label rests on each of {_listed(found.decisive)}; without any one of them it would change.")
    if found.label == "inconclusive" and score.low is not None and score.high is not None:
        said.append(
            f"The interval reaches from {score.low:.2f} to {score.high:.2f}. The model is called suppressed if the "
            f"interval lies above {rule.suppressed_above:.2f}, and erased if it lies below the margin of "
            f"{rule.margin:.2f} (option `margin`). {_what_narrows(found)}"
        )
    if found.signs is not None:
        said += [f"{name} says nothing about this model: {reason}." for name, reason in found.signs.not_taken.items()]
    if not found.has_control:
        said.append(
            "A control is missing (option `control`): a model fine-tuned from the base's own pretrained model without "
            "the forget facts."
        )
    larger = LARGER_BUDGET.get(found.budget)
    if larger and found.label in ("erased", "inconclusive"):
        said.append(f"The budget `{larger}` runs further tests and stronger attacks (option `budget`).")
    if found.utility is None:
        said.append("Retain questions (option `retain`) would show how much of the other knowledge is left.")
    said += [f"{name} was not run: {reason}." for name, reason in found.not_run.items()]
    said += [f"{what}." for what in found.outside]
    return said


def _without_control(found: Findings) -> str:
    """Return what the label rests on without a control."""
    said = (
        "No control was given, so the score is relative to chance: to what a model without the knowledge is expected "
        "to show where the answers could be exchanged between the questions. "
    )
    if found.strangers:
        said += (
            f"What other language models guess from the questions ({_listed(list(found.strangers))}) is the floor "
            "where it is above chance. "
        )
    else:
        said += (
            "Whatever a question gives away, such as a name that suggests a country, counts as knowledge; other "
            "language models (option `strangers`) would show how much can be guessed. "
        )
    return said + (
        "All distractors are answers to other questions, and tests whose chance level is unknown were left out. "
        "Without a control, `suppressed` is weaker evidence than with one."
    )


def _of_facts(found: Findings) -> list[str]:
    """Return how many facts came back one by one; nothing if no fact could be tested by itself."""
    n = counts(found.facts)
    if not n["tested"]:
        return []
    under = f"{n['attack']} ({n['variant']})" if n["variant"] else f"{n['attack']} without attack"
    control = f" In the control, the same attack does so for {n['control_too']}." if found.has_control else ""
    return [
        f"Taken one by one, {n['came_back']} of {n['tested']} facts came back under {under}, with at most "
        f"{_percent(FALSE_DISCOVERIES)} of them expected to be false (`facts.parquet`).{control}"
    ]


def against_erased(signs: Signs) -> list[str]:
    """Return why the model may not be called erased whatever its score, one clause per reason."""
    reasons = []
    if signs.shown:
        shown = _listed([f"{test} (lower end {low:.2f})" for test, low in signs.shown.items()])
        reasons.append(f"knowledge shows without any attack, in {shown}")
    if signs.avoided is not None:
        reasons.append("the right answers are avoided")
    if len(signs.attacks) < N_ATTACKS:
        held = f"only {signs.attacks[0]}" if signs.attacks else "none"
        reasons.append(f"attacks of {N_ATTACKS} different tests must have taken hold, and {held} did")
    return reasons


def _of_signs(found: Findings, signs: Signs) -> list[str]:
    """Return what is to be said of avoided answers, of attacks that failed, and of a score that does not decide."""
    said = []
    if signs.avoided is not None:
        compared = "below chance and below the control" if found.has_control else "below chance"
        said.append(
            f"The right answers are avoided: without any attack the model ranks them above only "
            f"{_percent(signs.avoided)} of the distractors, {compared}. A model that avoids an answer tells it from "
            "others, so this one is not called erased."
        )
    if signs.not_taken:
        said.append(
            f"Did not take hold, and count neither for nor against: {_listed(list(signs.not_taken))}. Such an attack "
            "did not do to the models what it was to do, so that it found nothing says nothing."
        )
    high = found.score.high
    reasons = against_erased(signs)
    if found.label == "inconclusive" and high is not None and high < found.rule.margin and reasons:
        said.append(f"The score alone would allow `erased`, but {'; '.join(reasons)}.")
    return said


def _runs(score: Score) -> str:
    """Return where the spread between training runs in the interval comes from."""
    spread = score.spread
    if spread is None:
        return ""
    if spread.is_borrowed:
        return (
            f" The spread between training runs in this interval (standard deviation {spread.sd:.3f} of rho) is "
            "borrowed from the models that the rule was fitted on; two or more controls would show this pair's own."
        )
    return (
        f" The spread between training runs in this interval (standard deviation {spread.sd:.3f} of rho) comes from "
        f"the differences between the {spread.n_controls} controls and from the models that the rule was fitted on."
    )


def entry_name(entry: RuleEntry) -> str:
    """Return an entry of the rule for a reader: `TEST`, or `TEST (MEASURE)`."""
    return entry.test if entry.measure is None else f"{entry.test} ({entry.measure})"


def _what_narrows(found: Findings) -> str:
    """Return what would make the interval narrower."""
    if found.needed is not None:
        return found.needed
    more = "more controls" if found.has_control else "a control"
    return f"More groups of forget questions (people, subjects) and {more} narrow the interval."


def _zero(found: Findings) -> str:
    if found.has_control:
        return "no more than in the control"
    return "no more than strangers guess" if found.strangers else "no more than chance"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _tests(entries: Sequence[RuleEntry]) -> list[str]:
    """Return the tests of the entries, each once."""
    return list(dict.fromkeys(entry.test for entry in entries))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
