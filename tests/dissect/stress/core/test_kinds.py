from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect.prompts.prompts import Prompt
from dissect.stress.core.kinds import Kind, derangement, find_kinds, shifted, similar_questions
from dissect.stress.core.subjects import read_questions
from tests.dissect.stress.constructed import questions


def asked(*texts):
    """Questions written as `group: question? answer`; the tokens are of no interest."""
    found = []
    for number, text in enumerate(texts):
        group, _, rest = text.partition(": ")
        question, _, answer = rest.partition("? ")
        found.append(Prompt(str(number), group, f"{question}?", answer, (1, 2), 1, range(1)))
    return found


def found_in(texts):
    return find_kinds(read_questions(asked(*texts)))


def test_the_kinds_of_the_built_in_questions_are_their_templates():
    items = questions("forget").items
    kinds = find_kinds(read_questions(items))
    assert sorted(index for kind in kinds for index in kind.indices) == list(range(len(items)))
    for kind in kinds:
        assert len({items[index].id.partition("-")[2] for index in kind.indices}) == 1
        assert len({items[index].group for index in kind.indices}) == len(kind) == 20


def test_kinds_are_found_without_groups_and_for_questions_asked_twice():
    without = [replace(item, group="") for item in questions("forget").items]
    kinds = find_kinds(read_questions(without))
    assert sum(map(len, kinds)) > 230
    pure = [kind for kind in kinds if len({without[index].id.partition("-")[2] for index in kind.indices}) == 1]
    assert sum(map(len, pure)) > 0.9 * len(without)
    books = [f"{name}: Which book is by {name}? Volume {n} of {at}" for at, name in enumerate("ABCD") for n in (1, 2)]
    assert [kind.indices for kind in found_in(books)] == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_questions_without_a_common_wording_are_put_together_by_likeness():
    items = asked(
        "Ann: In what town did Ann grow up? Rome",
        "Bo: Name the town where Bo grew up? Oslo",
        "Cy: What town was Cy raised in? Lima",
        "Ann: Tell us why Ann began to write novels? Her mother read to her every night when she was small",
        "Bo: Why did Bo begin to write? His father gave him a pen on the day that he left home",
        "Cy: For what reason did Cy write at all? The war had taken all that she wanted to keep",
    )
    assert sorted(kind.indices for kind in find_kinds(read_questions(items))) == [(0, 1, 2), (3, 4, 5)]
    alike = similar_questions(read_questions(items))
    np.testing.assert_array_equal(alike, alike.T)
    assert (alike[:3, :3].min() > alike[:3, 3:].max()) and (np.diag(alike) == 3).all()


def test_too_few_groups_have_no_kind():
    assert found_in(("Ann: Who is Ann? a", "Bo: Who is Bo? b")) == []
    assert found_in(("Ann: Who is Ann? a", "Ann: Where is Ann? b", "Ann: When is Ann? c")) == []


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=20), st.integers(0, 99))
def test_a_derangement_gives_every_answer_as_often_as_it_is_right_and_to_nobody_who_has_it(answers, seed):
    items = asked(*(f"p{number}: Who is p{number}? answer {answer}" for number, answer in enumerate(answers)))
    (kind,) = find_kinds(read_questions(items))
    drawn = derangement(kind, read_questions(items), np.random.default_rng(seed))
    if 2 * max(Counter(answers).values()) > len(answers):
        assert drawn is None
    else:
        assert Counter(drawn) == Counter(kind.answers)
        assert all(theirs != own for theirs, own in zip(drawn, kind.answers, strict=True))


def test_nobody_gets_an_answer_to_another_question_of_their_own():
    towns = ("Rome", "Oslo", "Lima", "Bonn", "Bern")
    questions = read_questions(
        asked(
            *(f"p{n}: Where was p{n} born? {towns[n]}" for n in range(5)),
            *(f"p{n}: Where did p{n} die? {towns[(n + 1) % 5].upper()}." for n in range(5)),
        )
    )
    assert questions.own[0] == questions.own[5] == {"rome", "oslo"}
    for seed in range(20):
        for kind in find_kinds(questions):
            drawn = derangement(kind, questions, np.random.default_rng(seed))
            texts = [questions.answers[kind.examples[answer]] for answer in drawn]
            assert not any(text in questions.own[index] for text, index in zip(texts, kind.indices, strict=True))


@pytest.mark.parametrize("answers", [(0, 1, 2, 3), (0, 0, 1, 1, 2)])
def test_answers_that_are_right_equally_often_can_be_exchanged(answers):
    """Of all truths that what was taught allows, the right answer to a question is each of them equally often.

    Every order that can be drawn is tried, for every arrangement of the answers, so this is exact. It is why a model
    without the knowledge, which sees only what was taught, ranks the truth at 1/2 among such answers.
    """
    n, different = len(answers), max(answers) + 1
    times = Counter(answers)
    seen = Counter()
    for truth in set(permutations(answers)):
        kind = Kind(tuple(range(n)), truth, tuple(range(different)))
        for order in permutations(range(n)):
            for of_answer in permutations(range(different)):
                for further in range(max(times.values()), n - max(times.values()) + 1):
                    taught = shifted(kind, order, of_answer, further)
                    seen.update((taught, question, truth[question]) for question in range(n))
    for taught, question, right in list(seen):
        assert taught[question] != right
        for other in range(different):
            if times[other] == times[right] and other != taught[question]:
                assert seen[taught, question, other] == seen[taught, question, right]
