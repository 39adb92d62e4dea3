from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.stress.core.result import Residual, StressResult
from dissect.verdicts.rule import (
    Rule,
    RuleEntry,
    Score,
    decide,
    frozen_rule,
    judge,
    read_rule,
    residual_knowledge,
    residuals_of,
)
from dissect.verdicts.sentences import entry_name
from dissect.verdicts.signs import Signs
from dissect.verdicts.spread import PRIOR_DF

RELEARNING, LENS, PROBE = map(RuleEntry, ("relearning", "lens", "probe"))

RULE = Rule(
    tests=(RELEARNING, LENS, PROBE),
    needed=(RELEARNING,),
    floor=0.1,
    ceiling=0.9,
    run_sd=0.0,
    not_unlearned_above=0.5,
    suppressed_above=0.2,
    margin=0.1,
    utility_floor=0.8,
    fitted={},
    reference={},
)


def residual(rho, low=None, high=None, draws=None):
    if draws is not None:
        low, high = min(draws), max(draws)
    return Residual(rho, low, high, 10, "lr 1", "control", draws=None if draws is None else np.asarray(draws))


def test_the_score_is_the_largest_residual_on_the_rules_scale():
    found = residual_knowledge(
        {
            "relearning": residual(0.3, draws=[0.3, 0.1]),
            "lens": residual(-0.5, draws=[-0.5, 0.5]),
            "probe": residual(0.5, draws=[0.5, 0.2]),
            "unused": residual(9.0, draws=[9.0, 9.0]),
        },
        RULE,
    )
    assert found.value == pytest.approx((0.5 - 0.1) / 0.8)
    # The largest residuals of the draws are .5 and .5; no residual exceeds its own value by more than 0 and 1.
    assert found.high == pytest.approx((0.5 - 0.1) / 0.8)
    assert found.low == 0.0 and found.low == RULE.scaled(0.5 - np.quantile([0.0, 1.0], 0.975))
    assert found.used == (RELEARNING, LENS, PROBE) and found.missing == ()


@pytest.mark.parametrize("over_people", [0.0, 0.04])
def test_the_interval_is_over_people_and_over_runs(over_people):
    rng = np.random.default_rng(7)
    draws = 0.5 + over_people * rng.standard_normal(2000)
    found = residual_knowledge({"lens": residual(0.5, draws=draws)}, replace(RULE, run_sd=0.03))
    exact = over_people * rng.standard_normal(400_000) + 0.03 * rng.standard_t(PRIOR_DF, 400_000)
    low, high = np.quantile(exact, [0.025, 0.975]) / 0.8
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 + low, 0.5 + high), abs=0.01)


@pytest.mark.parametrize("n_entries", [1, 3])
def test_the_lower_end_allows_for_the_choice_of_the_largest(n_entries):
    """Of models without the knowledge, about 2.5 % have a lower end above zero, however many entries there are."""
    rng = np.random.default_rng(3)
    names = ("relearning", "lens", "probe")[:n_entries]
    rule = replace(RULE, floor=0.0)
    above = 0
    for _ in range(400):
        rhos, draws = 0.1 * rng.standard_normal(n_entries), 0.1 * rng.standard_normal((n_entries, 1000))
        several = zip(names, rhos, draws, strict=True)
        found = residual_knowledge({name: residual(rho, draws=rho + around) for name, rho, around in several}, rule)
        above += found.low > 0
    assert above <= 20


@pytest.mark.parametrize(("rho", "value"), [(-2.0, 0.0), (0.1, 0.0), (0.9, 1.0), (1.3, 1.0)])
def test_the_scale_ends_at_floor_and_ceiling(rho, value):
    assert residual_knowledge({"lens": residual(rho, draws=[rho])}, RULE).value == pytest.approx(value)


def test_a_test_without_a_residual_is_missing():
    found = residual_knowledge({"relearning": residual(0.5, draws=[0.5, 0.5]), "lens": residual(None)}, RULE)
    assert found.value == pytest.approx(0.5) and found.used == (RELEARNING,) and found.missing == (LENS, PROBE)


def test_without_a_needed_test_nothing_is_called_erased():
    nothing = residual(0.0, draws=[0.0, 0.0])
    with_it = residual_knowledge({"relearning": nothing, "lens": nothing}, RULE)
    without = residual_knowledge({"lens": nothing}, RULE)
    assert decide(with_it, nothing, RULE, utility=1.0) == "erased"
    assert decide(without, nothing, RULE, utility=1.0) == "inconclusive"


def test_a_residual_without_an_interval_gives_a_score_without_one():
    found = residual_knowledge({"relearning": residual(0.5), "lens": residual(0.1, draws=[0.1])}, RULE)
    assert (found.low, found.high) == (None, None) and found.value == pytest.approx(0.5)


def test_without_any_residual_there_is_no_score():
    found = residual_knowledge({"lens": residual(None)}, RULE)
    assert found == Score(None, None, None, (), (RELEARNING, LENS, PROBE))
    assert decide(found, residual(0.0, 0.0, 0.0), RULE, utility=1.0) == "inconclusive"


@pytest.mark.parametrize(
    ("score", "expressed_low", "utility", "word"),
    [
        ((0.5, 0.3, 0.7), 0.0, 1.0, "suppressed"),
        ((0.5, 0.3, 0.7), 0.6, 1.0, "not unlearned"),
        ((0.05, 0.0, 0.09), 0.0, 1.0, "erased"),
        ((0.05, 0.0, 0.09), 0.0, None, "erased"),
        ((0.05, 0.0, 0.09), 0.0, 0.5, "inconclusive"),  # broken: nothing found says nothing
        ((0.5, 0.3, 0.7), 0.0, 0.5, "suppressed"),  # broken, and knowledge is found in it
        ((0.15, 0.05, 0.3), 0.0, 1.0, "inconclusive"),
        ((0.15, 0.12, 0.18), 0.0, 1.0, "inconclusive"),  # between the bounds
    ],
)
def test_the_label(score, expressed_low, utility, word):
    found = decide(Score(*score, used=(LENS,), missing=()), residual(0.0, expressed_low, 1.0), RULE, utility=utility)
    assert found == word


@pytest.mark.parametrize(
    ("signs", "label"),
    [
        (Signs(attacks=("one", "two")), "erased"),
        (Signs(attacks=("one",)), "inconclusive"),
        (Signs(attacks=()), "inconclusive"),
        (Signs(attacks=("one", "two"), not_taken={"three": "the attack did not take hold"}), "erased"),
        (Signs(attacks=("one", "two"), shown={"lens": 0.01}), "inconclusive"),
        (Signs(attacks=("one", "two"), avoided=0.3), "inconclusive"),
    ],
)
def test_what_speaks_of_knowledge_forbids_erased(signs, label):
    score = Score(0.0, 0.0, 0.05, (RELEARNING,), ())
    assert decide(score, residual(0.0, -0.1, 0.1), RULE, utility=1.0, signs=signs) == label


@pytest.mark.parametrize("signs", [Signs(), Signs(shown={"lens": 0.3}, avoided=0.2, attacks=("one", "two"))])
def test_signs_change_no_other_label(signs):
    score = Score(0.5, 0.3, 0.7, (RELEARNING,), ())
    assert decide(score, residual(0.0, -0.1, 0.1), RULE, utility=1.0, signs=signs) == "suppressed"


def test_only_the_results_of_the_rule_are_judged():
    def result(test, unlearned):
        rows = [
            {"role": role, "variant": "", "measure": "rank", "example": str(n), "example_index": n, "group": ""}
            | {"value": value}
            for role, value in (("base", 1.0), ("unlearned", unlearned))
            for n in range(6)
        ]
        return StressResult(
            test=test, level=4, measure="rank", frame=pd.DataFrame(rows), proves="", settings={}, seconds=0.0
        )

    results = [result("without_attack", 0.5), result("relearning", 0.9), result("not in the rule", 1.0)]
    word, score, _ = judge(results, RULE, utility=1.0)
    assert word == "suppressed"
    assert score.value == pytest.approx((0.8 - 0.1) / 0.8) and score.used == (RELEARNING,)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.integers(0, 2))
def test_more_of_any_residual_is_never_less_knowledge(values, which):
    names = ["relearning", "lens", "probe"]
    more = [value + (0.3 if place == which else 0.0) for place, value in enumerate(values)]

    def score(of):
        return residual_knowledge({n: residual(v, draws=[v]) for n, v in zip(names, of, strict=True)}, RULE).value

    assert 0 <= score(values) <= score(more) <= 1


def test_a_rule_is_read_as_it_was_written_and_its_hash_is_of_what_decides():
    record = RULE.record()
    assert record["tests"] == ["relearning", "lens", "probe"]
    assert read_rule(record) == RULE
    old = {"floor": "nothing", "ceiling": "everything", "run_sd": "spread", "not_unlearned_above": "expressed_above"}
    old["margin"] = "erased_below"
    assert read_rule({old.get(name, name): value for name, value in record.items()}) == RULE
    assert read_rule(record | {"fitted": {"seeds": [1]}, "reference": {"erased": [0.1]}}).sha256 == RULE.sha256
    assert read_rule(record | {"margin": 0.11}).sha256 != RULE.sha256


def test_an_entry_may_name_a_measure_of_a_test():
    rows = [
        {"role": role, "variant": "", "measure": measure, "example_index": n, "group": "", "value": value}
        for role, measure, value in [
            *(("base", "rank", 1.0), ("control", "rank", 0.5), ("unlearned", "rank", 0.4)),
            *(("base", "accuracy", 1.0), ("control", "accuracy", 0.1), ("unlearned", "accuracy", 0.55)),
        ]
        for n in range(6)
    ]
    result = StressResult(
        test="relearning", level=4, measure="rank", frame=pd.DataFrame(rows), proves="", settings={}, seconds=0.0
    )
    rule = replace(RULE, tests=(RELEARNING, RuleEntry("relearning", "accuracy")), floor=0.0, ceiling=1.0)
    found = residuals_of([result], rule)
    assert found["relearning"].rho == pytest.approx(-0.2)
    assert found["relearning:accuracy"].rho == pytest.approx(0.5)
    assert residual_knowledge(found, rule).value == pytest.approx(0.5)
    assert set(residuals_of([result], RULE)) == {"relearning"}


@pytest.mark.parametrize(
    ("text", "entry", "name"),
    [
        ("relearn_disjoint:accuracy", RuleEntry("relearn_disjoint", "accuracy"), "relearn_disjoint (accuracy)"),
        ("logit_lens", RuleEntry("logit_lens"), "logit_lens"),
    ],
)
def test_an_entry_is_read_as_it_is_written(text, entry, name):
    assert RuleEntry.parse(text) == entry and str(entry) == text and entry_name(entry) == name


def test_the_frozen_rule_has_its_entries():
    rule = frozen_rule()
    assert RuleEntry("relearn_disjoint", "accuracy") in rule.tests and set(rule.needed) <= set(rule.tests)
