"""Records of ConceptVectors: every key, by hand, and what is refused."""

from typing import Any

import pytest

from tests.unlearning.data.helpers import REAL_DATA, needs_real
from unlearning.common.errors import InputError
from unlearning.data.concept_vectors import ConceptRecord, cut_continuation, find_concepts

FIELDS: dict[str, Any] = {
    "Concept": "Ada",
    "Layer": 3,
    "Dim": 0,
    "QA": [" Where was Ada born?\n", "Who is Ben?"],
    "QA_with_answers": [
        "Question:  Where was Ada born?\n\n Answer: in Oslo.\nQuestion: Who is Ben?\n Answer: Hill",
        "Question: Who is Ben?\n Answer:",
    ],
    "answers_tokens_num": [4, 9],
    "text_completion": [{"First_half": "Ada was", "Second_half": "born."}],
    "unrelated_QA": ["Who is Dan?"],
    "wikipedia_content": "Ada was born in Oslo.",
}


def test_every_key_is_read() -> None:
    concept = ConceptRecord(FIELDS, "a.json, record 1")
    assert concept.name == "Ada" and concept.vector == (3, 0)
    assert concept.questions == FIELDS["QA"] and concept.unrelated_questions == ["Who is Dan?"]
    assert concept.questions_with_answers == FIELDS["QA_with_answers"] and concept.answer_lengths == [4, 9]
    assert concept.answers == ["in Oslo.", ""]
    assert concept.halves == [("Ada was", "born.")] and concept.first_halves == ["Ada was"]
    assert concept.article == "Ada was born in Oslo."


def test_a_record_needs_only_the_keys_that_are_read() -> None:
    concept = ConceptRecord({"QA": ["Who?"]}, "here")
    assert concept.name is None and concept.vector is None and concept.answers is None
    assert concept.answer_lengths is None and concept.article == ""
    assert concept.questions == ["Who?"]
    assert concept.unrelated_questions == concept.first_halves == concept.halves == []
    assert ConceptRecord({"First_half": "a", "Second_half": "b"}, "here").halves == [("a", "b")]


@pytest.mark.parametrize(
    ("changes", "read", "key"),
    [
        ({"QA": "Who?"}, "questions", "QA"),
        ({"QA": [1]}, "questions", "QA"),
        *(({"QA": value}, "questions", "QA") for value in (None, [], {}, 7, [["Who?"]], ["Who?", None])),
        ({"Concept": ["Ada"]}, "name", "Concept"),
        ({"Concept": None}, "name", "Concept"),
        ({"answers_tokens_num": ["4", 9]}, "answer_lengths", "answers_tokens_num"),
        ({"answers_tokens_num": [4.5, True]}, "answer_lengths", "answers_tokens_num"),
        ({"wikipedia_content": ["Ada"]}, "article", "wikipedia_content"),
        ({"QA_with_answers": ["one"]}, "answers", "QA_with_answers"),
        ({"QA_with_answers": [1, 2]}, "answers", "QA_with_answers"),
        ({"QA_with_answers": ["Question: other", "text"]}, "answers", "question 0: QA_with_answers"),
        ({"answers_tokens_num": [1]}, "answer_lengths", "answers_tokens_num"),
        ({"text_completion": ["half"]}, "first_halves", "text_completion"),
        ({"text_completion": {"First_half": "a"}}, "first_halves", "text_completion"),
        ({"text_completion": [{"First_half": "a"}]}, "halves", "text_completion"),
        ({"text_completion": [{"First_half": "a", "Second_half": 1}]}, "halves", "text_completion"),
        ({"QA": ["Who?", " "]}, "questions", "QA"),
        ({"unrelated_QA": [1]}, "unrelated_questions", "unrelated_QA"),
        ({"Dim": None}, "vector", "Dim None"),
        ({"Layer": True}, "vector", "Layer True"),
        ({"Dim": -1}, "vector", "Dim -1"),
    ],
)
def test_what_a_key_holds_otherwise_is_refused_in_one_line(changes: dict[str, Any], read: str, key: str) -> None:
    concept = ConceptRecord({**FIELDS, **changes}, "a.json, record 2")
    with pytest.raises(InputError, match=f"^a.json, record 2.*{key}") as refused:
        getattr(concept, read)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" in Oslo.\nQuestion: next", "in Oslo."),
        ("in Oslo. Question: next?\n Answer:", "in Oslo."),
        ("\n\n in Oslo ", "in Oslo"),
        ("Question: only", ""),
        (" \n ", ""),
        ("one line", "one line"),
    ],
)
def test_a_continuation_ends_at_its_line_or_at_the_next_question(text: str, expected: str) -> None:
    assert cut_continuation(text) == expected


@needs_real
def test_every_key_of_the_released_file_is_read() -> None:
    found = find_concepts(REAL_DATA)
    assert len(found) == 10
    for name, (fields, file) in found.items():
        concept = ConceptRecord(fields, str(file))
        assert concept.name == name and concept.vector is not None and concept.article
        assert concept.answers is not None and concept.answer_lengths is not None
        assert len(concept.questions) == len(concept.answers) == 10
        assert len(concept.halves) == len(concept.first_halves) > 0 and concept.unrelated_questions
