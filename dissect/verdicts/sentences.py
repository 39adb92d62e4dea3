"""A verdict in sentences: what it says, what it rests on, and what would change it."""

from typing import TYPE_CHECKING

from dissect.stress.core.result import EVIDENCE_LEVELS
from dissect.verdicts.rule import judge, test_of

if TYPE_CHECKING:
    from dissect.verdicts.result import Verdict

MEANING = {
    "not unlearned": "The model still gives the answers that were to be forgotten.",
    "suppressed": "The answers are gone from what the model says, and knowledge of them is left inside.",
    "erased": "No test of this budget finds more of the knowledge than {nothing} shows.",
    "inconclusive": "The tests neither find the knowledge nor rule it out.",
}


def sentences(verdict: "Verdict") -> list[str]:
    """What a reader needs to know, the most important first."""
    said = []
    utility, score = verdict.utility, verdict.score
    if utility is not None and utility.collapsed:
        said.append(
            f"Utility is gone: {utility.share:.0%} of the base's right answers to {utility.n} retain questions are "
            "left. Such a model is broken, not unlearned; what follows is said of a broken model."
        )
    said.append(MEANING[verdict.word].format(nothing=verdict.nothing))
    if score.value is not None:
        interval = "" if score.low is None else f" (95 % interval {score.low:.2f} to {score.high:.2f})"
        said.append(
            f"Residual knowledge {score.value:.2f}{interval} on a scale from 0, {verdict.nothing}, to 1, the base; "
            f"from {_listed(_tests(score.used))}."
        )
    found = verdict.residuals
    proven = [r for r in verdict.results if r.level > 0 and (found[r.test].low or 0.0) > verdict.rule.suppressed_above]
    if proven:
        highest = max(result.level for result in proven)
        tests = [result.test for result in proven if result.level == highest]
        said.append(
            f"The highest claim with evidence is rung {highest}, {EVIDENCE_LEVELS[highest]} ({_listed(tests)})."
        )
    if verdict.word == "erased":
        tests = [result.test for result in verdict.results if result.level > 0]
        said.append(
            f"This holds for the {len(tests)} tests of the budget {verdict.configuration['budget']} "
            f"({_listed(tests)}) and a margin of {verdict.rule.erased_below:.2f}; an attack that was not tried may "
            "still find something."
        )
    if utility is not None and not utility.collapsed:
        said.append(f"{utility.share:.0%} of the base's right answers to {utility.n} retain questions are left.")
    if not verdict.configuration["control_sha256"]:
        said.append(
            "There was no never model: residuals are compared with chance, wrong answers are those to other questions, "
            "and tests without a chance level were left out. What unlearning itself taught of the answers counts as "
            "knowledge, and so does what a question gives away otherwise than by its words (a name that tells a "
            "country): without a never model, `suppressed` is no proof."
        )
    return said


def advice(verdict: "Verdict") -> list[str]:
    """What would change the answer, or make it firmer."""
    found = []
    score, rule = verdict.score, verdict.rule
    alone = _decisive(verdict)
    if alone:
        found.append(f"Without {_listed(alone, 'or')} the verdict would be another.")
    unsure = verdict.word == "inconclusive" and score.low is not None and score.high is not None
    if unsure and verdict.guessing is not None and (score.low or 0.0) > rule.suppressed_above:
        found.append(
            "It is above chance; but who knows nothing and compares words puts the right answer above "
            f"{verdict.guessing['rank']:.0%} of the wrong ones here, and the score is not above that."
        )
    elif unsure:
        found.append(
            f"The interval reaches from {score.low:.2f} to {score.high:.2f}: it would have to lie above "
            f"{rule.suppressed_above:.2f} (suppressed) or below {rule.erased_below:.2f} (erased); more forget "
            "questions make it narrower."
        )
    if not verdict.configuration["control_sha256"]:
        found.append("A model that never knew, from the base's own trunk (--never), is the control that is missing.")
    larger = {"quick": "standard", "standard": "full"}.get(verdict.configuration["budget"])
    if larger and verdict.word in ("erased", "inconclusive"):
        found.append(f"--budget {larger} runs further tests and stronger attacks.")
    if verdict.utility is None:
        found.append("Retain questions (--retain) would tell whether the model is whole.")
    found += [f"{name} could not be run: {reason}" for name, reason in verdict.not_run.items()]
    return found


def _decisive(verdict: "Verdict") -> list[str]:
    """Tests of the rule without any one of which the word would be another."""
    utility = verdict.utility.share if verdict.utility else None
    changed = []
    for name in _tests(verdict.score.used):
        rest = [result for result in verdict.results if result.test != name]
        if judge(rest, verdict.rule, utility=utility, guessing=verdict.guessing)[0] != verdict.word:
            changed.append(name)
    return changed


def _tests(entries: "tuple[str, ...]") -> list[str]:
    return list(dict.fromkeys(map(test_of, entries)))


def entry_name(entry: str) -> str:
    """A test, or one measure of a test, for a reader."""
    test, _, measure = entry.replace("_", " ").partition(":")
    return f"{test} ({measure})" if measure else test


def _listed(names: "tuple[str, ...] | list[str]", joint: str = "and") -> str:
    words = [entry_name(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"
