from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError
from dissect.stress import crossover as module
from dissect.stress.core.finetuning import FineTuned, Recipe
from dissect.stress.core.subjects import read_questions
from dissect.stress.crossover import PairedGroups, crossover, pair_groups, permutation_test
from tests.dissect.stress.constructed import case_of, model, questions
from tests.dissect.stress.core.test_kinds import asked


def prompts_of(*texts):
    return replace(questions("forget"), items=tuple(asked(*texts)))


def pairs_of(n, first):
    return [PairedGroups(((2 * number, 2 * number + 1),), number in first) for number in range(n)]


def test_groups_are_paired_and_their_questions_matched_by_kind():
    items = questions("forget").items
    pairs = pair_groups(read_questions(items), seed=3)
    assert len(pairs) == 20 and sum(pair.first for pair in pairs) == 10
    assert sorted(index for pair in pairs for both in pair.facts for index in both) == list(range(len(items)))
    for pair in pairs:
        assert len({frozenset({items[i].group, items[j].group}) for i, j in pair.facts}) == 1
        for i, j in pair.facts:
            assert items[i].id.partition("-")[2] == items[j].id.partition("-")[2]


def test_facts_with_one_answer_have_no_partner():
    prompts = prompts_of(*(f"{n}: Where was {n} born? {('Rome', 'Oslo')[n % 2]}" for n in range(8)))
    for pair in pair_groups(read_questions(prompts.items)):
        assert all(prompts.items[i].answer != prompts.items[j].answer for i, j in pair.facts)
    with pytest.raises(InputError, match=r"at least four groups .* got 1 pair"):
        pair_groups(read_questions(asked(*(f"{n}: Where was {n} born? {('Rome', 'Oslo')[n == 0]}" for n in range(8)))))


@settings(max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=12).filter(lambda v: len(v) % 2 == 0), st.integers(0, 9))
def test_p_is_the_share_of_halves_with_as_large_an_effect(values, seed):
    n = len(values) // 2
    first = set(np.random.default_rng(seed).permutation(n)[: n // 2].tolist())
    speed = np.array(values)
    found = permutation_test(speed, pairs_of(n, first))
    assert found.exact and found.effect == pytest.approx(speed.mean())
    runs = np.array([speed[2 * at] + speed[2 * at + 1] for at in range(n)])
    runs[[at for at in range(n) if at not in first]] *= -1
    effects = [runs[list(half)].sum() - np.delete(runs, half).sum() for half in combinations(range(n), n // 2)]
    assert found.p == pytest.approx(np.mean(np.array(effects) >= speed.sum() - 1e-9))
    far = np.abs(np.array(effects) - np.mean(effects))
    assert found.p_two_sided == pytest.approx(np.mean(far >= abs(speed.sum() - np.mean(effects)) - 1e-9))


def test_p_is_uniform_over_the_halves_and_drawn_ones_agree():
    """Whatever the two runs give, half of the pairs is as good as any other: every p comes up as often as it should."""
    rng = np.random.default_rng(0)
    n, runs = 8, rng.normal(size=8) + 3.0  # the first run is three nats better for everybody
    found = []
    for half in combinations(range(n), n // 2):
        signs = np.array([1.0 if at in half else -1.0 for at in range(n)])
        found.append(permutation_test(np.repeat(signs * runs, 2), pairs_of(n, set(half))).p)
    np.testing.assert_allclose(np.sort(found), np.arange(1, len(found) + 1) / len(found))
    many = np.repeat(rng.normal(size=60) + 0.2, 2)
    drawn = permutation_test(many, pairs_of(60, set(range(30))))
    again = permutation_test(many, pairs_of(60, set(range(30))), seed=1)
    assert not drawn.exact and drawn.p == pytest.approx(again.p, abs=0.02)


def test_what_is_probable_for_everybody_cancels(monkeypatch):
    """A model that knows nothing, likes some answers and questions better than others, and learns what it is taught."""
    rng = np.random.default_rng(0)
    case = replace(case_of(model("demo:npo"), n=48), only="unlearned")
    items = case.forget.prompts.items
    liking = {text: float(rng.normal()) for item in items for text in (item.prompt, item.answer)}
    truth = {(item.prompt, item.answer) for item in items}
    known = {"share": 0.0}

    def fine_tuned_at(of, examples, recipe, *, steps, case):  # noqa: ARG001
        for n in steps:
            now["taught"] = {(example.prompt, example.answer): n for example in examples}
            yield n, FineTuned(of, np.zeros(1), 1.0, 0.1)

    def all_answers(of, facts, *, batch_size):  # noqa: ARG001
        several = zip(facts.prompts.items, facts.distractors, strict=True)
        pairs = [(item.prompt, item.answer) for right, others in several for item in (right, *others)]
        score = [
            liking[prompt] + liking[answer] + now["taught"].get((prompt, answer), 0) * (1 + known["share"] * is_true)
            for prompt, answer in pairs
            for is_true in [(prompt, answer) in truth]
        ]
        return np.array(score), np.zeros(len(score))

    now = {}
    monkeypatch.setattr(module, "fine_tuned_at", fine_tuned_at)
    monkeypatch.setattr(module, "all_answers", all_answers)
    test = crossover(case, curve=(2, 4)).tables["permutation"].iloc[0]
    assert test["effect"] == pytest.approx(0, abs=1e-12) and test["p"] > 0.3
    known["share"] = 0.5
    test = crossover(case, curve=(2, 4)).tables["permutation"].iloc[0]
    assert test["effect"] == pytest.approx(0.5 * 3) and test["p"] < 0.001


def test_the_base_learns_the_truth_faster():
    case = replace(case_of(model("demo:base"), n=36), control=None, only="base")
    result = crossover(case, recipe=Recipe(rate=0.01), curve=(3,))
    test = result.tables["permutation"].iloc[0]
    assert test["p"] < 0.01 and test["effect"] > 0.5
    assert result.level == 1 and result.measure == "speed" and result.floors == {"speed": 0.0}


def test_one_group_is_refused_in_one_line():
    prompts = prompts_of(*(f"Ann: What is Ann's {n}? {n}" for n in range(9)))
    with pytest.raises(InputError, match="at least four groups") as raised:
        pair_groups(read_questions(prompts.items))
    assert "\n" not in str(raised.value)
