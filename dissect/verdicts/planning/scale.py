"""The rule's numbers for a verdict with and without a control."""

from dataclasses import replace

from dissect.verdicts.rule import Rule, RuleEntry


def scale_of(rule: Rule, controls: int) -> Rule:
    """Return the rule whose entries and scale give the score with so many controls.

    Args:
        rule: The rule.
        controls: Number of controls; 0 without a control, where deranged relearning gives the score.

    Returns:
        The rule with those entries and that scale.
    """
    if controls:
        return rule
    return replace(rule, tests=(RuleEntry("deranged_relearning"),), floor=0.0, ceiling=0.6, run_sd=0.024)
