from dataclasses import replace

import numpy as np
import pytest

from dissect import InputError
from dissect.models.model import Model
from dissect.stress import deranged
from dissect.stress.core.distractors import Facts, normal
from dissect.stress.core.finetuning import FineTuned, Recipe
from dissect.stress.core.subjects import read_questions
from dissect.stress.deranged import deranged_lessons, deranged_relearning
from dissect.zoo.recipes import RECIPES, new_model
from tests.dissect.stress.constructed import case_of, gated, model, questions
from tests.dissect.stress.core.test_kinds import asked
from unlearning.common.bootstrap import clusters

TOKENIZER = model("demo:base").tokenizer

SHORT = (Recipe(rate=0.02, steps=8),)


def prompts_of(*texts):
    return replace(questions("forget"), items=tuple(asked(*texts)))


def distance(result, role="unlearned"):
    """How many standard errors over groups the mean rank of a role under attack is away from 1/2."""
    rows = result.frame.query(f"role == {role!r} and variant != '' and measure == 'rank'").sort_values("example_index")
    numbers = clusters(rows["group"].tolist())
    means = np.array([np.nanmean(rows["value"].to_numpy()[numbers == number]) for number in np.unique(numbers)])
    return (means.mean() - 0.5) / (means.std(ddof=1) / np.sqrt(len(means)))


def test_nothing_true_is_taught_and_what_is_compared_was_taught_as_often_to_others():
    prompts = questions("forget")
    items, own = prompts.items, read_questions(prompts.items).own
    lessons = deranged_lessons(prompts, 3, TOKENIZER, seed=5)
    at = {item.prompt: index for index, item in enumerate(items)}
    for lesson in lessons.several:
        taught = {}
        for example in lesson.examples:
            assert normal(example.answer) not in own[at[example.prompt]]
            taught.setdefault(normal(example.answer), []).append(items[at[example.prompt]].group)
        assert sorted(taught) == sorted({normal(item.answer) for item in items})
        for kind, compared in zip(lessons.kinds, lesson.compared, strict=True):
            texts = [normal(items[index].answer) for index in kind.examples]
            assert compared.any(1).all()
            for row, index in enumerate(kind.indices):
                for text in np.array(texts)[compared[row]]:
                    assert text not in own[index] and items[index].group not in taught[text]
                    assert len(taught[text]) == len(taught[normal(items[index].answer)])
    first, second = (tuple(example.answer for example in lesson.examples) for lesson in lessons.several[:2])
    assert first != second
    again = deranged_lessons(prompts, 3, TOKENIZER, seed=5).several[0]
    assert tuple(example.answer for example in again.examples) == first


def test_the_truth_is_at_one_half_for_every_scorer_that_does_not_depend_on_it(monkeypatch):
    """Answers are given to people at random; a scorer that reads questions, answers and what was taught, but not the
    truth, ranks the truth at 1/2, though it prefers some answers and dislikes what it was taught."""
    rng = np.random.default_rng(0)
    people, towns = 7, np.array([f"town {number}" for number in range(7)])
    liking = rng.normal(size=(people, len(towns))) + 3 * rng.normal(size=len(towns))
    numbers = {town: number for number, town in enumerate(towns)}
    now = {}

    def fine_tuned(of, examples, recipe, *, case):  # noqa: ARG001
        now["taught"] = {(example.prompt, example.answer) for example in examples}
        return FineTuned(of, np.zeros(1), 1.0, 0.1)

    def all_answers(of, facts, *, batch_size):  # noqa: ARG001
        several = zip(facts.prompts.items, facts.distractors, strict=True)
        items = [item for right, others in several for item in (right, *others)]
        scores = [
            liking[int(item.group), numbers[item.answer]]
            - 5.0 * ((item.prompt, item.answer) in now.get("taught", ()))
            + 0.1 * len({answer for _, answer in now.get("taught", ())} & {item.answer})
            for item in items
        ]
        return np.array(scores), np.zeros(len(items))

    monkeypatch.setattr(deranged, "fine_tuned", fine_tuned)
    monkeypatch.setattr(deranged, "all_answers", all_answers)
    start, found = case_of(model("demo:npo"), n=2), []
    for seed in range(150):
        truth = rng.permutation(towns)
        prompts = prompts_of(*(f"{n}: Where was {n} born? {truth[n]}" for n in range(people)))
        case = replace(start, forget=Facts(prompts, ((),) * people), control=None, retain=None, seed=seed)
        frame = deranged_relearning(replace(case, only="unlearned"), derangements=2).frame
        found.append(frame.query("variant != '' and measure == 'rank'")["value"].mean())
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / np.sqrt(len(found)) < 0.05


def test_knowledge_behind_a_gate_comes_back_though_nothing_true_is_taught():
    case = replace(case_of(gated("demo-neox:base")[0], base="demo-neox:base", n=36), retain=None)
    result = deranged_relearning(case, recipes=[Recipe(rate=0.01, steps=12)], derangements=1)
    assert result.residual().rho > 0.3 and result.level == 4
    assert distance(result) > 4 and abs(distance(result, "control")) < 3
    without = deranged_relearning(
        replace(case, control=None, only=None), recipes=[Recipe(rate=0.01, steps=12)], derangements=1
    ).residual()
    assert without.against == "floor" and without.low > 0.2


def test_what_strangers_guess_is_the_floor(monkeypatch):
    """A stranger that gives some of the answers away raises the floor; one that knows nothing hardly does."""
    truth = {item.prompt: item.answer for item in questions("forget").items}
    guessed = set(list(truth)[::4])
    rng = np.random.default_rng(0)

    def all_answers(of, facts, *, batch_size):  # noqa: ARG001
        several = zip(facts.prompts.items, facts.distractors, strict=True)
        items = [item for right, others in several for item in (right, *others)]
        gives = of.name == "demo:npo"
        bonus = [9.0 * (gives and item.prompt in guessed and truth[item.prompt] == item.answer) for item in items]
        return rng.normal(size=len(items)) + bonus, np.zeros(len(items))

    monkeypatch.setattr(deranged, "all_answers", all_answers)
    start = replace(case_of(model("demo:whp"), n=60), control=None)
    lessons = deranged_lessons(start.forget.prompts, 1, TOKENIZER)
    alone = deranged._floors(start, lessons)
    ignorant = deranged._floors(replace(start, strangers=(model("demo:never"),)), lessons)
    both = deranged._floors(replace(start, strangers=(model("demo:never"), model("demo:npo"))), lessons)
    assert alone["rank"] == 0.5 and ignorant["rank"] < 0.6
    assert both["rank"] > 0.6 and both["accuracy"] > alone["accuracy"] + 0.1


@pytest.mark.parametrize("name", ["demo:never", "untrained"])
def test_a_model_that_never_knew_is_at_one_half(name):
    of = model("demo:never")
    if name == "untrained":
        of = Model.wrap(new_model(RECIPES["demo"], len(of.tokenizer)).eval(), of.tokenizer, name=name)
    case = replace(case_of(of, n=60), retain=None, control=None, only="unlearned")
    assert abs(distance(deranged_relearning(case, recipes=SHORT, derangements=1))) < 2.5


def test_the_tables_tell_whether_the_attack_took_hold():
    case = replace(case_of(model("demo:whp"), n=24), only="unlearned")
    result = deranged_relearning(case, recipes=SHORT, derangements=2)
    (row,) = result.tables["validity"].to_dict("records")
    assert (row["role"], row["variant"]) == ("unlearned", SHORT[0].variant)
    assert row["loss_after"] < row["loss_before"] / 2 and 0 <= row["utility"] <= 1
    by_run = result.tables["derangements"]
    ranks = result.frame.query("variant != '' and measure == 'rank'")["value"]
    assert by_run["rank"].mean() == pytest.approx(ranks.mean()) and len(by_run) == 2
    assert by_run["rank"].nunique() == 2
    chance = result.floors["accuracy"]
    assert chance == pytest.approx(np.mean([1 / (size - 1) for size in result.settings["kinds"] for _ in range(size)]))


def test_facts_that_cannot_be_deranged_are_told():
    prompts = prompts_of(
        *(f"p{n}: Where was p{n} born? town {n}" for n in range(5)),
        *(f"p{n}: Is p{n} a writer? {'No' if n else 'Yes'}" for n in range(5)),
    )
    lessons = deranged_lessons(prompts, 2, TOKENIZER)
    assert len(lessons.kinds) == 1 and lessons.notes == (
        "5 of 10 facts have no others of their kind, or no derangement",
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([f"Ann: What is Ann's {n}? {n}" for n in range(9)], "at least 3 groups, got 1"),
        ([f"{n}: Where was {n} born? Rome" for n in range(9)], "at least 3 different answers, got 1"),
        (
            [f"{n}: Where was {n} born? {('Rome', 'Oslo', 'Bonn')[max(0, n - 6)]}" for n in range(9)],
            "answer to 78% of a kind",
        ),
        (
            [f"{n}: Where was {n} born? {('Rome', 'Oslo', 'Bonn')[(n > 2) + (n > 4)]}" for n in range(6)],
            "right equally often",
        ),
    ],
)
def test_facts_without_a_derangement_are_refused_in_one_line(texts, message):
    with pytest.raises(InputError, match=message) as raised:
        deranged_lessons(prompts_of(*texts), 2, TOKENIZER)
    assert "\n" not in str(raised.value)


def test_wrong_arguments_are_refused():
    case = case_of(model("demo:npo"), n=24)
    with pytest.raises(InputError, match="`recipes` must not be empty"):
        deranged_relearning(case, recipes=[])
    with pytest.raises(InputError, match="`derangements` must be at least 1, got 0"):
        deranged_relearning(case, derangements=0)
