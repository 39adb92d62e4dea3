"""JSON, JSON lines, CSV and parquet files."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import write_parquet
from unlearning import InputError
from unlearning.data import tables
from unlearning.data.records import MAX_CHARACTERS, _object, read_records

ROWS = [{"question": "Who, and why?", "answer": 'She said "no".\nTwice.'}, {"question": "NA", "answer": "007"}]
# Text as JSON and Python know it; surrogates and NUL are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


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
        ("a.csv", b"question,answer\nWho?,She\nWho, then?,Ines\n", "line 3: broken CSV: has 3 cells, and the header 2"),
        ("a.csv", b"question,answer\nWho, then?,Ines\n", "line 2: broken CSV: has 3 cells, and the header 2"),
        ("a.csv", b'question,answer\n"Who?,She\n', "line 2: broken CSV: a quotation mark is not closed"),
        ("a.csv", b"question,answer\nWho?\n", "line 2: broken CSV: has 1 cells, and the header 2"),
        ("a.csv", b'question,answer\n"Who\nis it?",She\nA,"b"c"\n', "line 4: broken CSV"),
        ("a.csv", b"answer,answer\na,b\n", "two columns have one name (answer, answer)"),
        ("a.csv", b"question,answer\nWho?,\xff\n", "not UTF-8 text"),
        ("a.csv", b"question,answer\nWho?,S\0he\n", "line 2: holds a NUL"),
        ("a.json", "[]".encode("utf-16-le"), "line 1: holds a NUL"),
        ("a.json", b'[{"a": "b"}, {"a": "b\\u0000"}]', "record 2: holds a NUL"),
        ("a.jsonl", b'{"a": "b"}\n{"a": ["b\\u0000"]}', "line 2: holds a NUL"),
        ("a.json", b'[{"a": NaN}]', "line 1: broken JSON: NaN is no number of JSON"),
        ("a.jsonl", b'{"a": -Infinity}', "line 1: broken JSON: -Infinity is no number of JSON"),
        ("a.json", b'[{"a": 1e400}]', "line 1: broken JSON: 1e400 is too large a number"),
        ("a.json", b"PAR1 but no more", "begins as a parquet file does"),
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


@given(cells=st.lists(st.lists(TEXTS, min_size=2, max_size=2), min_size=1, max_size=5))
@settings(max_examples=60)
def test_quoted_cells_are_read_as_they_are(cells: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cells") / "data.csv"
    lines = ["question,answer", *(",".join(map(quoted, row)) for row in cells)]
    path.write_bytes("\r\n".join(lines).encode())
    assert read_records(path) == [{"question": first, "answer": second} for first, second in cells]


class Counted(str):
    """A key that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)  # type: ignore[arg-type]  # of texts only


def test_a_key_that_is_there_twice_is_found_in_one_pass() -> None:
    keys = [Counted(f"key {number}") for number in range(2000)]
    with pytest.raises(ValueError, match='"key 1999" is there twice'):
        _object([(key, 1) for key in [*keys, Counted("key 1999")]])
    assert Counted.compared < 3 * len(keys)


def peak_of_refusal(path: Path, message: str) -> int:
    """Bytes of Python and Arrow that reading a file takes until it is refused with a message."""
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    try:
        with pytest.raises(InputError) as error:
            read_records(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}") and message in str(error.value) and len(str(error.value)) < 600
    return peak + pa.total_allocated_bytes() - arrow


def test_cells_that_are_not_there_are_not_made(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    for header in ("," * 20_000, ",".join(map(str, range(20_000)))):
        path.write_text(header + "\n" + "a,b\n" * 2000)
        assert peak_of_refusal(path, "columns, more than 1000") < 10_000_000  # 40 million cells would take 320 MB
    path.write_text("," * 900 + "\n" + "a,b\n" * 2000)
    assert peak_of_refusal(path, "two columns have one name") < 10_000_000


def repeated(text: str, count: int) -> pa.Array:
    """A text many times, kept once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


LONG = "q" * 50_000
BOMBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text in many rows": ({"question": repeated(LONG, 2000)}, {}),
    "plain texts that repeat": ({"question": pa.array([LONG] * 1200)}, {}),
    "a text many times in one list": (
        {"wrong": pa.ListArray.from_arrays(pa.array([0, 2000], pa.int32()), repeated(LONG, 2000))},
        {},
    ),
    "texts that share their beginnings": (
        {"question": pa.array([LONG] * 1200)},
        {"use_dictionary": False, "column_encoding": {"question": "DELTA_BYTE_ARRAY"}},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_parquet_file_does_not_unpack_to_gigabytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, options = BOMBS[name]
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table(columns), path, **options)
    size, unpacked = path.stat().st_size, 50_000 * 1200
    monkeypatch.setattr(tables, "MAX_BYTES", unpacked // 10)
    monkeypatch.setattr(tables, "_BATCH", 50)
    assert tables.MAX_RATIO * size < unpacked // 10, "the file is small"
    assert peak_of_refusal(path, "unpacks to more than") < unpacked / 2


def test_texts_that_share_their_beginnings_in_a_list_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    encoding = {"wrong.list.element": "DELTA_BYTE_ARRAY"}
    pq.write_table(pa.table({"wrong": [["a", "ab"]]}), path, use_dictionary=False, column_encoding=encoding)
    peak_of_refusal(path, "column wrong.list.element has the encoding DELTA_BYTE_ARRAY")


def test_values_that_take_no_space_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_CELLS", 10_000)
    path = tmp_path / "nulls.parquet"
    texts = pa.nulls(10_001, pa.string())
    for column in (texts, pa.ListArray.from_arrays(pa.array([0, 10_001], pa.int32()), texts)):
        pq.write_table(pa.table({"wrong": column}), path)
        assert peak_of_refusal(path, "has 10001 values, more than 10000") < 1_000_000


def test_lists_objects_and_dictionaries_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "wrong": ["x", "y"], "turns": [{"role": "user", "content": "hi"}]},
        {"question": "a", "wrong": [], "turns": None},
        {"question": None, "wrong": ["x"], "turns": []},
    ]
    path = tmp_path / "nested.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.set_column(0, "question", table["question"].dictionary_encode()), path)
    assert read_records(path) == rows


def test_a_column_that_python_cannot_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "far.parquet"
    pq.write_table(pa.table({"question": ["Who?"], "id": pa.array([2**60], pa.timestamp("us"))}), path)
    peak_of_refusal(path, 'column "id": cannot be read')


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_text_that_is_too_long_is_refused_with_its_record(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_CHARACTERS < 20_000_000  # some 200 bytes a character in a tokenizer
    monkeypatch.setattr("unlearning.data.records.MAX_CHARACTERS", 1000)
    path = tmp_path / f"long.{suffix}"
    for length in (1000, 1001):
        rows = [{"question": "Who?", "answer": "Ana"}, {"question": "q" * length, "answer": "Bo"}]
        if suffix == "parquet":
            write_parquet(path, rows)
        else:
            lines = [f'"{row["question"]}",{row["answer"]}' for row in rows]
            text = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
            path.write_text(text.get(suffix, "\n".join(["question,answer", *lines])))
        if length == 1000:
            assert read_records(path) == rows
        else:
            with pytest.raises(InputError, match=r"(record|line) 2: holds a text of 1001 characters, more than 1000"):
                read_records(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_of_too_many_records_is_refused(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_RECORDS", 100)
    path = tmp_path / f"many.{suffix}"
    for count in (100, 101):
        rows = [{"text": "a"}] * count
        if suffix == "parquet":
            write_parquet(path, rows)
        else:
            text = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
            path.write_text(text.get(suffix, "\n".join(["text", *["a"] * count])))
        if count == 100:
            assert read_records(path) == rows
        else:
            with pytest.raises(InputError, match=f"^{path}: has more than 100 records"):
                read_records(path)
