"""Plain text, paragraphs of sentences, and documents cut by tokens."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import REAL_DATA, TEXT, build_tokenizer, needs_real, write_lines
from unlearning import InputError
from unlearning.data.documents import cut_document, pack_sentences, read_text_documents
from unlearning.data.records import read_records
from unlearning.data.spans import encode_answer

TOKENIZERS = {bos: build_tokenizer(bos=bos) for bos in (False, True)}
TEXTS = st.text(st.sampled_from("ab .\n?Tallow"), min_size=1, max_size=80).filter(str.strip)


@given(text=TEXTS, max_length=st.integers(4, 12), bos=st.booleans(), append_eos=st.booleans())
@settings(max_examples=200)
def test_the_pieces_of_a_document_are_the_document(text: str, max_length: int, bos: bool, append_eos: bool) -> None:
    tokenizer = TOKENIZERS[bos]
    prefix = [tokenizer.bos_token_id] * bos
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * append_eos
    pieces = cut_document(tokenizer, text, max_length, append_eos=append_eos)
    if len(prefix + tokens) == 1:
        assert not pieces
        return
    assert all(piece.input_ids[: piece.answer_start] == prefix for piece in pieces)
    assert [token for piece in pieces for token in piece.input_ids[piece.answer_start :]] == tokens
    assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
    assert len(pieces) == 1 or all(piece.n_answer_tokens >= 2 for piece in pieces)
    room = max_length - len(prefix)
    assert len(pieces) == -(-len(tokens) // room)  # as few as can be
    assert all(piece.n_answer_tokens == room for piece in pieces[:-2])


def test_a_document_that_fits_is_encoded_as_any_text() -> None:
    for tokenizer in TOKENIZERS.values():
        assert cut_document(tokenizer, TEXT, 10_000, append_eos=True) == [
            encode_answer(tokenizer, "", TEXT, append_eos=True)
        ]


def test_too_short_a_piece_is_refused() -> None:
    with pytest.raises(InputError, match="`max_length`.*4.*got 3"):
        cut_document(TOKENIZERS[True], TEXT, 3)


def slow_paragraphs(text: str, longer_than: int) -> list[str]:
    """The published code's algorithm (2406.11614), spelled out: sentences stick together."""
    paragraphs, current = [], ""
    for sentence in re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text):
        current = current + sentence
        if len(current) > longer_than:
            paragraphs.append(current.strip())
            current = ""
    return [*paragraphs, current.strip()] if current else paragraphs


@given(text=TEXTS, longer_than=st.integers(0, 40))
@settings(max_examples=100)
def test_packing_without_a_separator_is_the_published_codes(text: str, longer_than: int) -> None:
    expected = [paragraph for paragraph in slow_paragraphs(text, longer_than) if paragraph]
    assert pack_sentences(text, longer_than=longer_than, separator="") == expected


@given(text=TEXTS, longer_than=st.integers(0, 40))
@settings(max_examples=100)
def test_packing_loses_nothing_but_white_space(text: str, longer_than: int) -> None:
    paragraphs = pack_sentences(text, longer_than=longer_than)
    assert "".join("".join(paragraphs).split()) == "".join(text.split())
    assert all(paragraph == paragraph.strip() != "" for paragraph in paragraphs)


def test_sentences_stay_whole_and_apart() -> None:
    assert pack_sentences(TEXT, longer_than=80) == [
        "The lighthouse of Marrow Point was built by Ines Tallow. She kept its lamp for forty years.",
        "Did anyone relieve her? Her nephew did, in the winter of the long ice. Mr. Tallow wrote nothing down.",
        "The lamp is still there.",
    ]
    assert "years.Did" not in " ".join(pack_sentences(TEXT, longer_than=200))
    assert "years.Did" in pack_sentences(TEXT, longer_than=200, separator="")[0]


@needs_real
def test_real_articles_are_packed_as_by_the_published_code() -> None:
    (path,) = (REAL_DATA / "conceptvectors").glob("*.json")
    for concept in read_records(path):
        article = concept["wikipedia_content"]
        released = pack_sentences(article, separator="")
        assert released == slow_paragraphs(article, 400)
        assert all(len(paragraph) > 395 for paragraph in released[:-1])  # 400 before the outer white space went
        assert "".join("".join(pack_sentences(article)).split()) == "".join(article.split())


def test_a_directory_of_texts_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "part" / "c.txt").write_text("three")
    (tmp_path / "notes.md").write_text("no")
    assert read_text_documents(tmp_path) == [{"text": "one\n"}, {"text": "two"}, {"text": "three"}]
    assert read_text_documents(tmp_path / "b.txt") == [{"text": "two"}]


def test_json_lines_are_not_read_as_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.txt", [{"title": "Lamps", "text": TEXT}] * 2)
    with pytest.raises(InputError, match="holds JSON and would be read as plain text; rename it to .json or .jsonl"):
        read_text_documents(path)
    path.write_text("1912\nwas a cold year.")  # a number is JSON too
    assert read_text_documents(path)[0]["text"].startswith("1912")


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "forget01.json").write_text("{}")
    with pytest.raises(InputError, match=r"a directory without .txt files; name a file in it \(it holds forget01.json"):
        read_text_documents(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match="a.txt: the file is empty"):
        read_text_documents(tmp_path)
