from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError
from dissect.models.pair import ModelPair
from dissect.stress import relearning
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.finetuning import FineTuned, Recipe, fine_tuned
from dissect.stress.core.scores import score_facts
from dissect.stress.core.texts import answer_texts
from dissect.stress.core.validity import invalid_variants
from dissect.stress.relearning import (
    full_recipes,
    quick_recipes,
    relearn_benign,
    relearn_disjoint,
    relearn_speed,
    same_exposure,
    split,
    without_answers,
)
from tests.dissect.stress.constructed import case_of, gated, model, questions
from unlearning import Example

N = 24
SHORT = (Recipe(0.02, steps=1),)


@pytest.fixture(scope="module")
def npo():
    return case_of(model("demo:npo"), n=N)


def _examples(facts):
    return [Example(item.prompt, item.answer) for item in facts.prompts.items]


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (relearn_disjoint, "demo-neox:base"),
        pytest.param(relearn_disjoint, "demo:base", marks=pytest.mark.slow),
        pytest.param(relearn_benign, "demo:base", marks=pytest.mark.slow),
    ],
)
def test_knowledge_behind_a_gate_comes_back_by_other_facts_and_by_other_people(test, name):
    """One neuron shuts everything off; nothing that opens it says anything of the facts asked."""
    case = case_of(gated(name)[0], base=name, n=24)
    result = test(case, recipes=[Recipe(0.02, steps=12, batch_size=12)])
    found = result.residual()
    assert found.rho > 0.6 and found.low > 0.3 and result.level == 4
    plain = result.frame.query("role == 'unlearned' and variant == '' and measure == 'correct'")
    assert plain["value"].mean() == 0


def test_the_never_model_as_unlearned_has_no_residual():
    case = case_of(model("demo:never"), n=4)
    for result in (relearn_disjoint(case, recipes=SHORT), relearn_speed(case, recipes=SHORT, curve=(1,))):
        frame = result.frame.query("role != 'base'").set_index(["variant", "measure", "example"])
        ours, theirs = (frame[frame["role"] == role]["value"] for role in ("unlearned", "control"))
        pd.testing.assert_series_equal(ours, theirs)


@pytest.mark.slow
def test_other_facts_teach_a_model_nothing_that_never_knew():
    """What RTT rests on: never + T is no better than never on V, and no worse, though T's answers are preferred."""
    case = case_of(model("demo:never"), n=120)
    result = relearn_disjoint(case, recipes=[Recipe(0.02, steps=16)])
    frame = result.frame.query("role == 'control' and measure == 'rank'").pivot(
        index="example_index", columns="variant", values="value"
    )
    gain = frame["rate 0.02"] - frame[""]
    assert abs(gain.mean()) < 2.5 * gain.std() / np.sqrt(len(gain.dropna()))
    # Without care for what training treats alike, it would seem to lose what it never had.
    parts = split(case.forget, 2, seed=0)
    rest = case.forget.select(parts[1])
    after = fine_tuned(model("demo:never"), _examples(rest), Recipe(0.02, steps=16), case=case).model
    biased = score_facts(after, case.forget.select(parts[0])).rank.mean()
    assert biased < frame["rate 0.02"].iloc[parts[0]].mean() - 0.03


def test_every_fact_is_asked_once_and_never_after_training_on_its_group(npo, monkeypatch):
    seen = []

    def spy(of, examples, recipe, *, case):  # noqa: ARG001
        seen.append({example.prompt for example in examples})
        return FineTuned(of, np.zeros(1), 0.0, 0.0)

    monkeypatch.setattr(relearning, "fine_tuned", spy)
    result = relearn_disjoint(npo, recipes=SHORT, folds=4)
    parts = split(npo.forget, 4, seed=npo.seed)
    assert sorted(place for part in parts for place in part) == list(range(N))
    for taught, part in zip(seen, parts, strict=False):
        groups = {npo.forget.groups[place] for place in part}
        others = {item.prompt for item in npo.forget.prompts.items if item.group not in groups}
        assert taught == others and len(taught) < N
    assert len(seen) == 12  # four folds of each of three models
    # A training that does nothing changes nothing, fold by fold; `certainty` alone compares the facts of one fold.
    for _, rows in result.frame.query("measure != 'certainty'").groupby(["role", "measure"]):
        table = rows.pivot(index="example_index", columns="variant", values="value")
        np.testing.assert_allclose(table["rate 0.02"], table[""], atol=1e-5)


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(0, 50), st.booleans())
def test_folds_keep_groups_whole_and_are_as_equal_as_can_be(folds, seed, grouped):
    facts = _some_facts()
    if not grouped:
        items = tuple(replace(item, group="") for item in facts.prompts.items)
        facts = Facts(replace(facts.prompts, items=items), facts.distractors)
    parts = split(facts, folds, seed=seed)
    assert sorted(place for part in parts for place in part) == list(range(len(facts)))
    keys = [group or str(place) for place, group in enumerate(facts.groups)]
    of_part = [{keys[place] for place in part} for part in parts]
    assert sum(map(len, of_part)) == len(set(keys))
    assert max(map(len, of_part)) - min(map(len, of_part)) <= 1


@cache
def _some_facts():
    return case_of(model("demo:npo"), n=60).forget


def test_wrong_answers_are_kept_where_training_treats_them_as_the_right_one(npo):
    facts = npo.forget.select([0])
    item, wrong = facts.prompts.items[0], facts.distractors[0]
    told = same_exposure(facts, [f"It is {wrong[0].answer}, as I said.", f"Or {wrong[3].answer}?"])
    assert told.distractors[0] == (*wrong[1:3], *wrong[4:])
    both = same_exposure(facts, [f"{item.answer} and {wrong[0].answer}"])
    assert both.distractors[0] == wrong[:1]
    assert same_exposure(facts, ["nothing of it"]).distractors == facts.distractors
    assert (
        same_exposure(facts, [f"un{wrong[0].answer}ed"]).distractors == facts.distractors
    )  # words, not parts of words
    assert same_exposure(facts, [wrong[0].answer], indices=[]).distractors == facts.distractors


def test_texts_with_a_forget_answer_are_left_out(npo):
    answers = [item.answer for item in npo.forget.prompts.items]
    texts = [
        Example("", f"They went to {answers[0].upper()}."),
        Example(f"What of {answers[1]}?", "Nothing"),
        Example("", f"x{answers[0]}x"),
        Example("Who?", "Nobody"),
    ]
    assert without_answers(texts, npo.forget) == texts[2:]


def test_benign_texts_have_no_forget_answer_and_that_is_told(npo):
    texts = [Example("", "The lake is deep."), Example("", f"It is {npo.forget.prompts.items[0].answer}.")]
    result = relearn_benign(replace(npo, retain=None), recipes=SHORT, texts=texts)
    assert set(result.frame["variant"]) == {"", "unrelated, rate 0.02"}
    assert any("1 of 2 unrelated texts" in note for note in result.notes)
    assert result.settings["texts"] == {"unrelated": 1}


def test_speed_is_the_mean_over_the_curve(npo):
    case = npo.at_most(6)
    result = relearn_speed(case, recipes=[Recipe(0.02, batch_size=6)], curve=(1, 3))
    of_never = model("demo:never")
    by_hand = [
        score_facts(fine_tuned(of_never, _examples(case.forget), Recipe(0.02, n, 6), case=case).model, case.forget)
        for n in (1, 3)
    ]
    rows = result.frame.query("role == 'control' and variant == 'rate 0.02' and measure == 'logprob'")
    np.testing.assert_allclose(rows["value"], np.mean([scores.logprob for scores in by_hand], axis=0), atol=1e-4)
    curve = result.tables["curve"].set_index(["role", "steps"])
    assert set(curve.index) == {(role, n) for role in ("base", "unlearned", "control") for n in (0, 1, 3)}
    assert curve.loc[("control", 3), "logprob"] == pytest.approx(by_hand[1].logprob.mean(), abs=1e-4)
    control = curve.loc["control", "logprob"]
    assert control[0] < control[1] < control[3]
    assert "Speed only" in result.proves and result.level < 4


def test_speed_needs_a_never_model(npo):
    case = npo.at_most(6)
    alone = Case(ModelPair(case.pair.base, case.pair.unlearned), None, case.forget)
    found = relearn_speed(alone, recipes=[Recipe(0.02, batch_size=6)], curve=(4,)).residual()
    assert found.rho is None and "without a control" in found.reason


def test_the_search_starts_in_the_middle_and_ends_where_an_attack_takes_hold(npo, monkeypatch):
    """All models get the same rates, the base too; the table tells losses and utility of each."""
    quick = [recipe.rate for recipe in quick_recipes()]
    assert quick[0] == sorted(quick)[len(quick) // 2] and len(set(quick)) == len(quick)
    full = full_recipes()
    assert len({recipe.variant for recipe in full}) == len(full) and sum(not recipe.lora_rank for recipe in full) >= 4

    case = npo.at_most(8)
    monkeypatch.setattr(
        relearning, "quick_recipes", lambda: (Recipe(1.0, steps=2), Recipe(0.02, steps=20), Recipe(0.01))
    )
    result = relearn_disjoint(case)
    assert list(invalid_variants(result)) == ["rate 1"]
    assert [one["variant"] for one in result.settings["tried"]] == ["rate 1", "rate 0.02"]
    table = result.tables["validity"].set_index(["role", "variant"])
    assert set(table.index) == {(r, v) for r in ("base", "unlearned", "control") for v in ("rate 1", "rate 0.02")}
    assert table.loc[("base", "rate 1"), "utility"] < 0.5 < table.loc[("base", "rate 0.02"), "utility"]
    assert (table["loss_after"].xs("rate 0.02", level="variant") < 0.2).all()


def test_a_training_that_diverges_is_an_attack_that_did_not_take_hold(npo):
    result = relearn_disjoint(npo.at_most(8), recipes=[Recipe(1e30, steps=2)])
    assert result.residual().rho is None and "did not take hold" in result.residual().reason
    assert np.isfinite(result.frame.query("measure != 'certainty'")["value"]).all()


def test_other_wordings_are_taught_of_the_same_facts_and_are_less_alike(npo, monkeypatch):
    seen = []

    def spy(of, examples, recipe, *, case):  # noqa: ARG001
        seen.append(list(examples))
        return FineTuned(of, np.zeros(1), 0.0, 0.0)

    monkeypatch.setattr(relearning, "fine_tuned", spy)
    other = questions("forget_paraphrased")
    result = relearn_disjoint(npo, recipes=SHORT, wordings=other)
    assert set(result.frame["variant"]) == {"", "rate 0.02", "other wording, rate 0.02"}
    plain, reworded = seen[:2], seen[6:8]
    for same, changed in zip(plain, reworded, strict=True):
        assert {one.answer for one in changed} == {one.answer for one in same}
        assert not {one.prompt for one in changed} & {one.prompt for one in same}
    alike = result.settings["likeness"]
    assert alike["as asked"] > 0.9 > 0.8 > alike["other wording"]
    without = relearn_disjoint(npo, recipes=SHORT, wordings=questions("retain"))
    assert any("too few of the given wordings" in note for note in without.notes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda case: relearn_disjoint(case, folds=1), "from 2 to"),
        (lambda case: relearn_disjoint(case, folds=1000), "from 2 to"),
        (lambda case: relearn_disjoint(case, recipes=()), "recipes"),
        (lambda case: relearn_disjoint(case, recipes=SHORT * 2), "recipes.*another rate"),
        (lambda case: relearn_benign(replace(case, retain=None)), "retain.*general"),
        (lambda case: relearn_speed(case, curve=()), "curve.*increasing"),
        (lambda case: relearn_speed(case, curve=(3, 2)), "curve.*increasing"),
        (lambda case: relearn_speed(case, curve=(0, 2)), "curve.*increasing"),
        (
            lambda case: relearn_benign(
                replace(case, retain=None), texts=[Example("", case.forget.prompts.items[0].answer)]
            ),
            "unrelated texts",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(npo, call, match):
    with pytest.raises(InputError, match=match) as refused:
        call(npo)
    assert "\n" not in str(refused.value)


def test_what_the_unlearned_model_answers_under_attack_is_kept(npo):
    recipe = Recipe(0.02, steps=2, batch_size=4)
    benign, disjoint = (test(npo, recipes=[recipe]).tables["texts"] for test in (relearn_benign, relearn_disjoint))
    for table in (benign, disjoint):
        assert set(table["role"]) == {"unlearned"} and list(table["example_index"]) == list(range(N))
    after = fine_tuned(npo.pair.unlearned, without_answers(_examples(npo.retain), npo.forget), recipe, case=npo)
    assert list(benign["text"]) == answer_texts(after.model, npo.forget)
    (held_out, _) = split(npo.forget, 2, seed=npo.seed)
    taught = npo.forget.select([index for index in range(N) if index not in held_out])
    after = fine_tuned(npo.pair.unlearned, _examples(taught), recipe, case=npo)
    assert [disjoint["text"][index] for index in held_out] == answer_texts(after.model, npo.forget.select(held_out))
