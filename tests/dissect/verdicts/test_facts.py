"""Which facts came back: p-values that hold, false discoveries at their rate, and models of known facts."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.stress.core.result import StressResult, fact_rows
from dissect.stress.core.scores import all_answers, fact_certainty, fact_scores, score_facts
from dissect.stress.core.texts import answer_texts, text_rows
from dissect.verdicts.facts import FALSE_DISCOVERIES, QUESTIONS, counts, fact_table, false_discovery_rates
from dissect.verdicts.rule import frozen_rule, residuals_of
from tests.dissect.stress.constructed import case_of, model

RULE = frozen_rule()


def drawn(seed, n=200, known=0, size=8):
    """Scores of answers that are exchangeable within each fact, on a scale of its own; `known` of them are raised."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(-5, 2, (n, 1)) + rng.lognormal(0, 0.5, (n, 1)) * rng.standard_t(4, (n, size + 1))
    scores[:known, 0] += 25
    return scores[:, 0], list(scores[:, 1:])


def test_without_knowledge_p_is_uniform():
    p = np.concatenate([1 - fact_certainty(*drawn(seed)) for seed in range(20)])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.02 if level > 0.05 else 0.008)


def test_known_facts_do_not_change_the_others():
    right, distractors = drawn(0)
    more = right.copy()
    more[:50] += 100
    before, after = fact_certainty(right, distractors), fact_certainty(more, distractors)
    np.testing.assert_array_equal(before[50:], after[50:])
    n_null = sum(map(len, distractors))
    assert (after[:50] == 1 - 1 / (1 + n_null)).all()


def test_false_discoveries_are_no_more_than_said():
    found, false = 0, []
    for seed in range(40):
        q = false_discovery_rates(1 - fact_certainty(*drawn(seed, n=100, known=30)))
        said = q <= FALSE_DISCOVERIES
        found += said[:30].sum()
        false.append(said[30:].sum() / max(1, said.sum()))
    assert np.mean(false) < FALSE_DISCOVERIES and found / (40 * 30) > 0.9


def test_facts_with_too_few_or_equal_distractors():
    right = np.array([1.0, 1.0, 0.0, -1.0])
    distractors = [np.array([0.0, 0.1, 0.2]), *[np.zeros(4)] * 3]
    found = fact_certainty(right, distractors)
    assert np.isnan(found[0])
    # All twelve distractors stand in the middle of their like, where the third right answer is too.
    np.testing.assert_allclose(found[1:], [12 / 13, 0.0, 0.0])
    assert np.isnan(fact_certainty(np.zeros(2), [np.zeros(0)] * 2)).all()


@given(st.integers(0, 50), st.floats(0, 10))
def test_a_more_probable_answer_is_no_less_certain(seed, more):
    right, distractors = drawn(seed, n=10)
    raised = right.copy()
    raised[3] += more
    assert fact_certainty(raised, distractors)[3] >= fact_certainty(right, distractors)[3]


@given(st.lists(st.one_of(st.just(float("nan")), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_false_discovery_rate_is_its_definition(values):
    p = np.array(values)
    found = false_discovery_rates(p)
    known = p[~np.isnan(p)]
    for value, q in zip(p, found, strict=True):
        if np.isnan(value):
            assert np.isnan(q)
        else:
            # The smallest rate at which a threshold at or above this p is allowed.
            rates = [len(known) * other / (known <= other).sum() for other in known if other >= value]
            assert q == pytest.approx(min(1.0, *rates))


@pytest.fixture(scope="module")
def case():
    return case_of(model("demo:npo"))


@pytest.fixture(scope="module")
def half(case):
    """What a model gives that knows every second fact, and the results of two tests on it."""
    facts = case.forget
    answers = {name: all_answers(model(f"demo:{name}"), facts) for name in ("base", "never")}
    sizes = [1 + len(others) for others in facts.distractors]
    knows = np.arange(len(facts)) % 2 == 0
    mixed = [
        np.where(np.repeat(knows, sizes), of_base, of_never)
        for of_base, of_never in zip(answers["base"], answers["never"], strict=True)
    ]
    base, never = (fact_scores(facts, *answers[name]) for name in ("base", "never"))
    plain = [("base", "", base), ("unlearned", "", never), ("control", "", never)]
    attacked = [("unlearned", "lr 1", fact_scores(facts, *mixed)), ("control", "lr 1", never)]
    options = {"measure": "rank", "proves": "", "settings": {}, "seconds": 0.0}
    said = {role: answer_texts(model(name), facts) for role, name in (("base", "demo:base"), ("control", "demo:never"))}
    texts = [(role, "", range(len(facts)), found) for role, found in said.items()]
    first = StressResult(
        test="without_attack", level=0, frame=fact_rows(facts, plain), tables={"texts": text_rows(texts)}, **options
    )
    attack_texts = text_rows([("unlearned", "lr 1", range(len(facts)), ["said"] * len(facts))])
    second = StressResult(
        test="relearn_disjoint",
        level=4,
        frame=fact_rows(facts, plain + attacked),
        tables={"texts": attack_texts},
        **options,
    )
    return knows, [first, second]


def questions_of(case):
    items = case.forget.prompts.items
    return pd.DataFrame([(item.id, item.group, item.prompt, item.answer) for item in items], columns=list(QUESTIONS))


def test_the_facts_that_a_model_knows_are_those_that_came_back(case, half):
    knows, results = half
    table = fact_table(results, residuals_of(results, RULE), RULE, questions_of(case))
    assert (table["attack"] == "relearn_disjoint").all() and (table["variant"] == "lr 1").all()
    found = table["came_back"].to_numpy()
    assert found[knows].mean() > 0.8 and found[~knows].sum() <= 2 * FALSE_DISCOVERIES * found.sum()
    assert table["control_too"].sum() <= 2
    told = counts(table)
    assert (told["n"], told["tested"], told["came_back"]) == (len(table), len(table), found.sum())
    assert table["rank_attacked"][knows].mean() == pytest.approx(table["rank_base"][knows].mean())
    assert (table["rank_unlearned"] == table["rank_control"]).all()
    assert (table["text_attacked"] == "said").all() and table["text_unlearned"].isna().all()
    right = table["text_base"].str.strip().str.rstrip(".") == table["answer"].str.strip().str.rstrip(".")
    assert right.mean() > 0.8 > 0.4 > (table["text_control"].str.strip() == table["answer"].str.strip()).mean()


def test_a_model_that_never_knew_gets_nothing_back(case):
    facts = case.forget
    never, base = (score_facts(model(f"demo:{name}"), facts) for name in ("never", "base"))
    q = false_discovery_rates(1 - never.certainty)
    assert (q <= FALSE_DISCOVERIES).mean() < 0.05
    assert (false_discovery_rates(1 - base.certainty) <= FALSE_DISCOVERIES).mean() > 0.8


def test_without_a_residual_or_the_measure_no_fact_is_tested(case, half):
    _, results = half
    frame = results[1].frame
    old = StressResult(
        test="relearn_disjoint",
        level=4,
        measure="rank",
        frame=frame[frame["measure"] != "certainty"],
        proves="",
        settings={},
        seconds=0.0,
    )
    for given_results in (results[:1], [results[0], old]):
        table = fact_table(given_results, residuals_of(given_results, RULE), RULE, questions_of(case))
        assert table["p"].isna().all() and not table["came_back"].any() and counts(table)["tested"] == 0
