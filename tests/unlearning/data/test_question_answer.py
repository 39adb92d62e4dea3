"""Question-answer files."""

import json
from pathlib import Path

import pytest

from unlearning import Example, InputError, read_examples


def write(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_questions_are_wrapped_and_prompts_are_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.json",
        [{"question": "Who {is} it?", "answer": "Ada", "id": "7"}, {"prompt": "It is", "answer": " Ben"}],
    )
    assert read_examples(path) == [Example("Question: Who {is} it?\nAnswer:", "Ada"), Example("It is", " Ben")]
    assert read_examples(path, template="Q: {question} A:")[0].prompt == "Q: Who {is} it? A:"


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "", "answer": "plain text"}\n\n{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    assert read_examples(path) == [Example("", "plain text"), Example("a", "b")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Who?"}, 'record 2: the answer is missing; give it under "answer", "completion"'),
        (
            {"question": "Who?", "answer": None},
            'record 2: "answer" is null; give an answer. The keys are question, answer',
        ),
        ({"question": " ", "answer": "Ada"}, 'record 2: "question" is empty'),
        ({"answer": "Ada"}, 'record 2: needs "question" or "prompt"'),
        ({"question": "Who?", "answer": "  "}, "record 2: the answer is empty"),
        ({"question": 3, "answer": "Ada"}, 'record 2: "question" must be text, got int'),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, record: object, message: str) -> None:
    path = write(tmp_path / "data.json", [{"question": "Who?", "answer": "Ada"}, record])
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_without_a_place_for_the_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`template` must hold {question}"):
        read_examples(write(tmp_path / "data.json", [{"question": "Who?", "answer": "Ada"}]), template="Answer:")
