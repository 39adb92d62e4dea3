"""A verdict in sentences: what was found, what the finding rests on, and what would change the label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dissect.verdicts.rule import Label, Rule, RuleEntry, Score, Utility

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
        rule: The rule that was applied.
        evidence: One row per test, as `Verdict.evidence` returns it.
        has_control: Whether residuals are relative to a control; else to chance.
        lexical_overlap: Without a control, the lexical-overlap baseline by measure; None with a control.
        not_run: Reasons why tests of the budget were not run, by test.
        decisive: Tests without any one of which the label would change.
        budget: Name of the budget.
    """

    label: Label
    score: Score
    utility: Utility | None
    rule: Rule
    evidence: pd.DataFrame
    has_control: bool
    lexical_overlap: Mapping[str, float] | None
    not_run: Mapping[str, str]
    decisive: Sequence[str]
    budget: str


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
            f"base's knowledge), measured by {_listed(_tests(score.used))}."
        )
    attacked = found.evidence[found.evidence["level"] > 0]
    proven = attacked[attacked["low"].astype(float) > found.rule.suppressed_above]
    if len(proven):
        highest = proven[proven["level"] == proven["level"].max()]
        said.append(
            f"The highest evidence level reached is {highest['level'].iloc[0]}, {highest['claim'].iloc[0]} "
            f"({_listed(list(highest['test']))})."
        )
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
        said.append(
            "No control was given. Residuals are therefore relative to chance, all distractors (the wrong answers "
            "that the right one is ranked among) are answers to other questions, and tests whose chance level is "
            "unknown were left out. Whatever unlearning itself taught about the answers counts as knowledge, and so "
            "does whatever a question gives away other than by its words, such as a name that suggests a country. "
            "Without a control, `suppressed` is no proof."
        )
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
        if found.lexical_overlap is not None and score.low > rule.suppressed_above:
            said.append(
                "The score is above chance, but not above a lexical-overlap baseline, which already ranks the right "
                f"answer above {_percent(found.lexical_overlap['rank'])} of the distractors."
            )
        else:
            said.append(
                f"The interval reaches from {score.low:.2f} to {score.high:.2f}. The model is called suppressed if the "
                f"interval lies above {rule.suppressed_above:.2f}, and erased if it lies below the margin of "
                f"{rule.margin:.2f} (option `margin`). {_what_narrows(found)}"
            )
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
    return said


def entry_name(entry: RuleEntry) -> str:
    """Return an entry of the rule for a reader: `TEST`, or `TEST (MEASURE)`."""
    return entry.test if entry.measure is None else f"{entry.test} ({entry.measure})"


def _what_narrows(found: Findings) -> str:
    """Return what would make the interval narrower."""
    more = "More groups of forget questions (people, subjects) and more controls narrow the interval"
    return f"{more}." if found.has_control else "More groups of forget questions and a control narrow the interval."


def _zero(found: Findings) -> str:
    return "no more than in the control" if found.has_control else "no more than chance"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _tests(entries: Sequence[RuleEntry]) -> list[str]:
    """Return the tests of the entries, each once."""
    return list(dict.fromkeys(entry.test for entry in entries))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
