"""JSON, JSON lines, CSV and parquet files."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import write_parquet
from unlearning import InputError
from unlearning.data.records import read_records

ROWS = [{"question": "Who, and why?", "answer": 'She said "no".\nTwice.'}, {"question": "NA", "answer": "007"}]
# Text as JSON and Python know it; surrogates are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str, bom: bytes) -> None:
    path = tmp_path / f"data.{suffix}"
    separator = "\t" if suffix == "tsv" else ","
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    if suffix == "parquet":
        write_parquet(path, ROWS)
    else:
        text = {"json": json.dumps(ROWS, indent=1), "jsonl": "\n".join(map(json.dumps, ROWS))}.get(
            suffix, "\n".join(separator.join(map(quoted, row)) for row in cells)
        )
        path.write_bytes(bom + text.encode())
    assert read_records(path) == ROWS


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=60)
def test_json_lines_keep_every_separator_inside_a_text(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    lines = [json.dumps({"text": f"a\u2028{text}\x85"}, ensure_ascii=False) for text in texts]
    path.write_bytes("\n".join(lines).encode())
    assert [record["text"] for record in read_records(path)] == [f"a\u2028{text}\x85" for text in texts]


def test_a_list_of_texts_is_a_list_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    path.write_text('["one", "two"]')
    assert read_records(path) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b'[{"a": 1},\n{"b": }]', "line 2: broken JSON"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "b"', "line 2: broken JSON"),
        (
            "a.json",
            b'{\n "rows": [{"a": "b"}]\n}',
            "one JSON object over several lines",
        ),
        ("a.jsonl", b'{"a": "b"}\n3', "line 2: expected an object, got int"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
        ("a.csv", b"", "the file is empty; it should hold a header and rows"),
        ("a.csv", b"question,answer\n", "there are no rows under the header (question, answer)"),
        ("a.csv", b"question,answer\nWho?,She\nWho, then?,Ines\n", "broken CSV: Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"question,answer\nWho, then?,Ines\n", "broken CSV: Expected 2 fields in line 2, saw 3"),
        ("a.csv", b'question,answer\n"Who?,She\n', "broken CSV: EOF inside string"),
        ("a.csv", b"answer,answer\na,b\n", "two columns have one name (answer, answer)"),
        ("a.csv", b"question,answer\nWho?,\xff\n", "not UTF-8 text"),
        ("a.parquet", b"PAR1 but no more", "not a whole parquet file"),
        ("a.parquet", b"", "not a whole parquet file"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole parquet file"):
        read_records(path)
    write_parquet(path, [])
    with pytest.raises(InputError, match="no rows"):
        read_records(path)
