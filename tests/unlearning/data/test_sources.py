"""From any name to examples."""

import itertools
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
        ("x" * 300 + ".json", "cannot be read: File name too long"),
        ("x" * 300 + ".txt", "cannot be read: File name too long"),
        ("x" * 300, "cannot be read: File name too long"),
        ("x" * 300 + ":y", "no such file, and no data set 'xxx"),
        ("hub:" + "x" * 300, "write hub:owner/name"),
        ("hub:" + "x" * 300 + "/y", "the hub refused it"),
        ("tofu:" + "x" * 300, "no such split"),
        ("a\0b.json", "no such file"),
        ("a\0b", "no such file"),
        ("a\0b:c", "no such file"),
    ],
    ids=itertools.count(),
)
def test_an_unknown_name_is_refused(source: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_training_data(source)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("hello world".encode("utf-16-le"), "line 1: holds a NUL"),
        ("hello world".encode("utf-16"), "not UTF-8 text"),
        (b"a\0b" * 100, "line 1: holds a NUL"),
        (b"\x00\x01\x02", "line 1: holds a NUL"),
        (b"a\nb\nc\0", "line 3: holds a NUL"),
        (b"PAR1 and more", "begins as a parquet file"),
        (b"%PDF-1.4 and more", "begins as a PDF file"),
        (b"PK\x03\x04 and more", "begins as a zip or office file"),
        (b'{"question": "Who?", "answer": "Ana"}\n', "holds JSON"),
        (b'[\n {"question": "Who?", "answer": "Ana"}\n]', "holds JSON"),
    ],
)
def test_what_is_no_text_is_no_document(raw: bytes, message: str, tmp_path: Path) -> None:
    for path in (tmp_path / "x.txt", tmp_path / "texts" / "x.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        with pytest.raises(InputError) as error:
            read_training_data(path if path.parent == tmp_path else path.parent)
        assert str(error.value).startswith(f"{path}") and message in str(error.value)


def test_a_document_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearning.data.records.MAX_CHARACTERS", 1000)
    (tmp_path / "x.txt").write_text("[1] " + "a" * 996)
    assert len(read_training_data(tmp_path / "x.txt").examples[0].answer) == 1000
    (tmp_path / "x.txt").write_text("a" * 1001)
    with pytest.raises(InputError, match="x.txt: holds a text of 1001 characters, more than 1000"):
        read_training_data(tmp_path / "x.txt")


def test_columns_that_say_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort\nWho?,Ines\n")
    with pytest.raises(
        InputError, match='a.csv, record 1: needs "question" or "prompt", .* its keys are frage, antwort'
    ):
        read_training_data(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("question,answer\nWho?,Ines\nWhere?\n")
    with pytest.raises(InputError, match="a.csv, line 3: broken CSV: has 1 cells, and the header 2"):
        read_training_data(tmp_path / "a.csv")
