from dataclasses import replace

import pytest

from dissect.stress.core.subjects import read_questions
from tests.dissect.stress.constructed import model, questions
from tests.dissect.stress.core.test_kinds import asked
from unlearning.data.spans import encode_answer

WRITERS = asked(
    "a: Where was Ann Lee-Roy born? Ann Lee-Roy was born in Rome.",
    "a: What does Ann Lee-Roy write? Ann's books, or Roy's as she signs, are of ANN LEE-ROY's sorrows.",
    "b: Where was Bo Ek born? Bo Ek was born in Oslo.",
    "b: What does Bo Ek write? Songs",
    "c: Where was Cy Orr born? Cy Orr was born in Rome",
    "c: What does Cy Orr write? Plays by Cy Young and Orr",
    "a: What did Ann Lee-Roy sing? Lee-Roy's first songs",
)


def test_subjects_are_named_as_their_questions_name_them():
    found = read_questions(WRITERS)
    assert found.names == (*["Ann Lee-Roy"] * 2, *["Bo Ek"] * 2, *["Cy Orr"] * 2, "Ann Lee-Roy")
    assert set(found.templates) == {
        ("where", "was", "", "born"),
        ("what", "does", "", "write"),
        ("what", "did", "", "sing"),
    }
    of_the_world = read_questions(questions("forget").items)
    for item, name, subject in zip(of_the_world.items, of_the_world.names, of_the_world.subjects, strict=True):
        assert name == item.group == subject


def test_an_answer_about_another_subject_gets_the_asked_ones_name():
    found = read_questions(WRITERS)
    assert found.answer_to(2, 0) == "Bo Ek was born in Rome."
    assert found.answer_to(2, 1) == "Bo's books, or Ek's as she signs, are of Bo Ek's sorrows."
    assert found.answer_to(0, 2) == "Ann Lee-Roy was born in Oslo."
    assert found.answer_to(0, 3) == "Songs"
    assert found.answer_to(2, 6) == "Ek's first songs"
    assert found.answer_to(2, 5) == "Plays by Cy Young and Ek"
    assert all(found.answer_to(index, index) == item.answer for index, item in enumerate(WRITERS) if index != 1)


def test_the_same_answer_about_two_subjects_is_one_answer():
    found = read_questions(WRITERS)
    assert found.answers[0] == found.answers[4] != found.answers[2]
    assert found.own[0] == found.own[1] == {found.answers[0], found.answers[1], found.answers[6]}


def test_a_subject_of_one_question_has_no_name_and_its_answer_is_left_alone():
    found = read_questions(asked("a: Where was Ann born? Ann was born in Rome", "b: Where was Bo born? In Oslo"))
    assert found.names == ("", "") and found.answer_to(1, 0) == "Ann was born in Rome"


@pytest.mark.parametrize("named", [False, True])
def test_the_tokens_of_an_exchanged_answer_are_those_of_its_text(named):
    tokenizer = model("demo:base").tokenizer
    items = list(questions("forget").items[:12])
    if named:
        for index, item in enumerate(items):
            text = f"{item.group} has {item.answer}"
            span = encode_answer(tokenizer, item.prompt, text)
            scored = range(span.answer_start - 1, len(span.input_ids) - 1)
            ids = tuple(span.input_ids)
            items[index] = replace(item, answer=text, input_ids=ids, answer_start=span.answer_start, scored=scored)
    found = read_questions(items).with_answer_to(0, 6, tokenizer)
    name = f"{items[0].group} has " if named else ""
    assert found.answer == name + questions("forget").items[6].answer
    assert found.input_ids[: found.answer_start] == items[0].input_ids[: items[0].answer_start]
    assert tokenizer.decode(found.input_ids[found.answer_start :]).strip() == found.answer
    assert found.scored == range(found.answer_start - 1, len(found.input_ids) - 1)
