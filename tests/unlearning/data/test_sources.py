"""From any name to examples."""

from pathlib import Path

import pytest

from tests.unlearning.data.helpers import LLAMA_3, TEXT, build_tokenizer, write_json, write_lines
from unlearning import Example, InputError
from unlearning.data.chat import chat_format
from unlearning.data.documents import pack_sentences
from unlearning.data.sources import read_training_data


def test_texts_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert read_training_data(tmp_path / "a.txt").examples == [Example("", TEXT)]
    (tmp_path / "b.txt").write_text("The second book.")
    data = read_training_data(str(tmp_path))
    assert data.examples == [Example("", TEXT), Example("", "The second book.")]
    assert data.source == str(tmp_path) and data.notes == ("2 documents",)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " \n"}, {"question": "Who?", "answer": "Ines"}])
    data = read_training_data(path)
    assert data.examples == [Example("", "one"), Example("Question: Who?\nAnswer:", "Ines")]
    assert data.notes == ("1 of 3 documents are empty and left out", "1 prompts with answers, 1 documents")
    with pytest.raises(InputError, match="no example in it has any text"):
        read_training_data(write_lines(path, [{"text": ""}]))


def test_documents_are_packed_into_paragraphs_where_asked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": TEXT}, {"prompt": TEXT, "answer": TEXT}])
    examples = read_training_data(path, pack=80).examples
    assert examples == [*(Example("", text) for text in pack_sentences(TEXT, longer_than=80)), Example(TEXT, TEXT)]
    assert len(examples) == 4


def test_a_chat_wraps_questions_and_prompts_but_no_documents(tmp_path: Path) -> None:
    chat = chat_format(build_tokenizer(chat_template=LLAMA_3))
    records = [{"question": "Who?", "answer": "Ines"}, {"prompt": "Who?", "answer": "Ines"}, {"text": TEXT}]
    path = write_json(tmp_path / "a.json", records)
    asked = Example(chat.prompt("Who?"), "Ines")
    assert read_training_data(path, chat=chat).examples == [asked, asked, Example("", TEXT)]
    with pytest.raises(InputError, match="both wrap the question"):
        read_training_data(path, chat=chat, template="{question}")
    with pytest.raises(InputError, match="`template` must hold {question}"):
        read_training_data(path, template="Who")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.json", "missing.json: no such file"),
        ("tofuu:forget05", "no data set 'tofuu'; did you mean 'tofu'? there are tofu, muse-news, muse-books, wmdp"),
        ("zzz:forget05", "no data set 'zzz'; there are tofu,"),
    ],
)
def test_an_unknown_name_is_refused(source: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_training_data(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_columns_that_say_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort\nWho?,Ines\n")
    with pytest.raises(
        InputError, match='a.csv, record 1: needs "question" or "prompt", .* its keys are frage, antwort'
    ):
        read_training_data(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("question,answer\nWho?,Ines\nWhere?\n")
    with pytest.raises(InputError, match="a.csv, record 2: the answer is empty"):
        read_training_data(tmp_path / "a.csv")
