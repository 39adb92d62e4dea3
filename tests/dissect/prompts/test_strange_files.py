"""Hundreds of generated files: each is read as it is meant, or refused in one line that names the file."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dissect import load_prompts
from dissect.behaviour.prompts import Sources
from dissect.cli import main as dissect_main
from tests.command_lines import call_main
from tests.dissect.helpers import build_tokenizer
from unlearning.cli import main as unlearning_main
from unlearning.common.errors import InputError
from unlearning.data.question_answer import ANSWER_KEYS, read_examples
from unlearning.data.sources import read_training_data

TOKENIZER = build_tokenizer()
SEEDS = 80
"""Files of each format."""

MOST_SECONDS = 5.0
"""Processor time for one file; a reader that follows what a file asks for takes minutes."""

DEEP = "[" * 100_000 + "]" * 100_000
LONG_NUMBER = "7" * 5000

Record = dict[str, Any]


def good_records(rng: random.Random) -> list[Record]:
    """Records that every reader takes."""
    text, answer = rng.choice(("question", "prompt")), rng.choice(ANSWER_KEYS)
    more: Record = rng.choice(({}, {"group": "Ada"}, {"id": "seven {n}"}, {"note": "kept"}))
    return [
        {
            text: f"Where was {rng.choice(('Ada', 'Bo', 'Zoë', '安娜'))} {n} born?",
            answer: f"In Oslo {n}",
            **{key: value.replace("{n}", str(n)) for key, value in more.items()},
        }
        for n in range(rng.randint(1, 4))
    ]


class Raw(str):
    """JSON that `json` would not write."""


BAD_TEXTS: list[Any] = [5, True, 0.5, [], ["a"], {"a": "b"}, [["a"]], "", " \n", "\ud83d", "a\udc00b", None]
BAD_LABELS: list[Any] = [[], ["a"], {"a": 1}, True, "\ud83d"]
BAD_WRONGS: list[Any] = [
    ["a", ["b"]],
    [["a"]],
    ["a", 5],
    ["a", ""],
    5,
    {"a": "b"},
    '["a", "b"]',
    ["['a', 'b']"],
    ["\ud83d"],
]
BAD_VALUES: list[Any] = [
    *map(Raw, ("NaN", "-Infinity", "1e400", '"\\u0000"')),
    Raw(DEEP),
    Raw(LONG_NUMBER),
    Raw(f"[{LONG_NUMBER}]"),
    "\ud83d",
    {"\udc00": 1},
]


def text_key(record: Record) -> str:
    return next(key for key in record if key in ("question", "prompt"))


def answer_key(record: Record) -> str:
    return next(key for key in record if key in ANSWER_KEYS)


def spoilt(rng: random.Random, records: list[Record]) -> str:
    """Spoil one record; returns the readers that must refuse it."""
    record = rng.choice(records)
    what = rng.choice(("text", "answer", "label", "wrong", "right", "same id", "value", "lost", "misspelt"))
    if what == "text":
        record[text_key(record)] = rng.choice([bad for bad in BAD_TEXTS if bad not in ("", " \n")])
    elif what == "answer":
        record[answer_key(record)] = rng.choice(BAD_TEXTS)
    elif what == "label":
        record[rng.choice(("id", "group"))] = rng.choice(BAD_LABELS)
        return "dissect"
    elif what == "wrong":
        record[rng.choice(("wrong", "perturbed_answer"))] = rng.choice(BAD_WRONGS)
        return "dissect"
    elif what == "right":
        right = record[answer_key(record)]
        record["wrong"] = ["In Lima", rng.choice((right, f" {right}\n"))]
        return "dissect"
    elif what == "same id":
        place = rng.randint(0, len(records) - 1)
        records.append({**record, "id": rng.choice((place, str(place))) if "id" not in record else record["id"]})
        return "dissect"
    elif what == "value":
        record["more"] = rng.choice(BAD_VALUES)
    elif what == "lost":
        del record[rng.choice((text_key(record), answer_key(record)))]
    else:
        record["answers"] = record.pop(answer_key(record))
    return "both"


def encoded(value: Any) -> str:
    """JSON, with raw values as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {encoded(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(encoded, value)) + "]" if isinstance(value, list) else json.dumps(value)


def broken_text(rng: random.Random, text: str) -> bytes:
    """A text that was damaged on its way."""
    raw = text.encode()
    place = rng.randrange(1, len(raw) - 1)
    return rng.choice(
        (
            raw[:place] + b"\xff" + raw[place:],
            raw[:1] + DEEP.encode() + raw[1:],
            raw[:1] + LONG_NUMBER.encode() + raw[1:],
            raw.rstrip()[:-1],
            b"",
            b" \n\n",
            b"[]",
            b"3",
            b"{}",
            b"[[], []]",
            b"\x00" * 50,
            text.encode("utf-16-le"),
            raw[:1] + b"}" + raw[1:],
            DEEP.encode(),
        )
    )


def write_json(rng: random.Random, folder: Path, lines: bool) -> tuple[Path, list[Record], str]:
    records = good_records(rng)
    path = folder / ("data.jsonl" if lines else "data.json")
    kind = rng.choice(("good", "spoilt", "spoilt", "broken", "twice"))
    refused = spoilt(rng, records) if kind == "spoilt" else "" if kind == "good" else "both"
    text = "\n".join(map(encoded, records)) if lines else encoded(records)
    if kind == "twice":
        key = text_key(records[0])
        text = text.replace("{", f'{{"{key}": "Who?", ', 1)
    path.write_bytes(
        broken_text(rng, text) if kind == "broken" else rng.choice(("", "\ufeff")).encode() + text.encode()
    )
    return path, records, refused


def write_csv(rng: random.Random, folder: Path) -> tuple[Path, list[Record], str]:
    records = good_records(rng)
    kind = rng.choice(("good", "empty answer", "open quote", "longer", "twice", "wrong", "bytes", "header", "nothing"))
    if kind == "empty answer":
        records[0][answer_key(records[0])] = ""
    if kind == "wrong":
        for record in records:
            record["wrong"] = rng.choice(('["a", "b"]', "['a', 'b']", '[["a"]]'))
    names = list(records[0])
    rows = [names, *(list(record.values()) for record in records)]
    if kind == "longer":
        rows[-1] = [*rows[-1], "one more"]
    if kind == "twice":
        rows = [[row[0], *row] for row in rows]
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    if kind == "open quote":
        lines[-1] = lines[-1][:-1]
    raw = "\n".join(lines[:1] if kind == "header" else lines).encode()
    raw = {"bytes": raw[:-2] + b"\xff" + raw[-2:], "nothing": b"\n"}.get(kind, raw)
    path = folder / "data.csv"
    path.write_bytes(raw)
    return path, records, "" if kind == "good" else "dissect" if kind == "wrong" else "both"


def write_parquet(rng: random.Random, folder: Path) -> tuple[Path, list[Record], str]:
    records = good_records(rng)
    kind = rng.choice(("good", "null", "twice", "bytes", "broken bytes", "numbers", "lists", "cut", "junk", "nothing"))
    question, answer = text_key(records[0]), answer_key(records[0])
    columns: dict[str, Any] = {name: [record[name] for record in records] for name in records[0]}
    replaced: dict[str, Any] = {
        "null": [None, *columns[answer][1:]],
        "bytes": [b"Oslo"] * len(records),
        "numbers": list(range(len(records))),
        "lists": [["Oslo"]] * len(records),
    }
    if kind in replaced:
        columns[rng.choice((question, answer)) if kind != "null" else answer] = replaced[kind]
    arrays = [pa.array(column) for column in columns.values()]
    if kind == "broken bytes":
        broken = pa.array([b"\xff\xfe"] * len(records), pa.binary())
        arrays[0] = pa.Array.from_buffers(pa.string(), len(records), broken.buffers())
    names = list(columns)
    if kind == "twice":
        arrays, names = [*arrays, arrays[0]], [*names, names[0]]
    table = pa.Table.from_arrays(arrays, names=names)
    path = folder / "data.parquet"
    pq.write_table(table.slice(0, 0) if kind == "nothing" else table, path)
    raw = path.read_bytes()
    half = len(raw) // 2
    if kind == "cut":
        path.write_bytes(raw[: -rng.randint(1, 40)])
    if kind == "junk":
        path.write_bytes(raw[:half] + rng.randbytes(90) + raw[half + 90 :])
    return path, records, "" if kind == "good" else "either" if kind == "junk" else "both"


def write_concepts(rng: random.Random, folder: Path) -> tuple[Path, list[Record], str]:
    questions = [f"Who is Ada {n}?" for n in range(rng.randint(1, 3))]
    concept: Record = {
        "Concept": "Ada",
        "QA": questions,
        "QA_with_answers": [f"Question: {question}\n Answer: a writer" for question in questions],
        "answers_tokens_num": [4] * len(questions),
    }
    lists = [None, [], "Who?", {"a": "b"}, [1], [["Who?"]], [None], ["Who?", None], ["\ud83d"], 7, Raw(DEEP), [""]]
    key = rng.choice(("", "QA", "QA", "QA_with_answers", "answers_tokens_num", "Concept", "unrelated_QA"))
    if key == "unrelated_QA":
        lists = [bad for bad in lists if bad not in (None, [])]
    elif key == "Concept":
        lists = [bad for bad in lists if bad != "Who?"]
    elif key in ("QA_with_answers", "answers_tokens_num"):  # without answers it is the base's to answer
        lists = [bad for bad in lists if bad is not None]
    if key:
        concept[key] = rng.choice(lists)
    path = folder / "concepts.json"
    path.write_text(encoded([concept]))
    records = [{"question": question, "answer": "a writer"} for question in questions]
    return path, records, "concepts" if key else ""


FORMATS: dict[str, Callable[[random.Random, Path], tuple[Path, list[Record], str]]] = {
    "json": lambda rng, folder: write_json(rng, folder, lines=False),
    "jsonl": lambda rng, folder: write_json(rng, folder, lines=True),
    "csv": write_csv,
    "parquet": write_parquet,
    "concepts": write_concepts,
}


def read_by_dissect(path: Path) -> list[tuple[str, str]]:
    assert Sources(path).has_own_retain is False
    return [(item.prompt, item.answer) for item in load_prompts(path, TOKENIZER).items]


def read_by_unlearning(path: Path) -> list[tuple[str, str]]:
    examples = read_examples(path)
    assert read_training_data(path).examples == examples
    return [(example.prompt, example.answer) for example in examples]


READERS = {"dissect": read_by_dissect, "unlearning": read_by_unlearning}


def outcome(reader: Callable[[Path], list[tuple[str, str]]], path: Path) -> list[tuple[str, str]] | str:
    """What is read, or the message of the refusal."""
    started = time.process_time()
    try:
        found: list[tuple[str, str]] | str = reader(path)
    except InputError as error:
        found = str(error)
    assert time.process_time() - started < MOST_SECONDS
    return found


def assert_one_line(message: str, path: Path) -> None:
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 500, message
    message.encode()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_as_it_is_meant_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    kept = {True: 0, False: 0}
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path, records, refused = FORMATS[name](random.Random(f"{name} {seed}"), folder)
        for package, reader in READERS.items():
            if name == "concepts" and package == "unlearning":
                continue  # reads the article, which these records lack
            found = outcome(reader, path)
            if isinstance(found, str):
                assert refused, (path, found)
                assert_one_line(found, path)
            else:
                assert refused in ("", "either") or (refused, package) == ("dissect", "unlearning"), (path, found)
                if refused != "either":
                    expected = [(str(record[text_key(record)]), record[answer_key(record)]) for record in records]
                    assert [answer for _, answer in found] == [answer for _, answer in expected]
                    assert all(text in prompt for (prompt, _), (text, _) in zip(found, expected, strict=True))
            kept[not isinstance(found, str)] += 1
    assert min(kept.values()) >= 5, "both happen"


@pytest.mark.parametrize("reader", READERS.values())
@pytest.mark.parametrize("name", ["data.json", "data.csv", "data.parquet"])
def test_a_pipe_is_not_waited_for(reader: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    found = outcome(reader, path)
    assert isinstance(found, str) and "is a pipe" in found
    assert_one_line(found, path)


@pytest.mark.parametrize("wrong", BAD_WRONGS, ids=repr)
@pytest.mark.parametrize("key", ["wrong", "perturbed_answer"])
def test_what_is_no_list_of_wrong_answers_is_refused(key: str, wrong: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": "Who?", "answer": "Ada", key: wrong}]))
    found = outcome(read_by_dissect, path)
    assert isinstance(found, str) and "record 1" in found
    assert key in found or "half a character" in found
    assert_one_line(found, path)


@pytest.mark.parametrize("cell", ['["a", "b"]', "['a', 'b']", '[["a"]]'])
def test_a_cell_with_a_list_of_wrong_answers_is_not_one_answer(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'question,answer,wrong\nWho?,Ada,"{quoted}"\n')
    found = outcome(read_by_dissect, path)
    assert isinstance(found, str) and "wrong" in found
    assert_one_line(found, path)


COMMANDS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "patch": (dissect_main, ["patch", "--base", "demo:base", "--unlearned", "demo:npo", "--data"]),
    "verdict": (dissect_main, ["verdict", "--base", "demo:base", "--unlearned", "demo:npo", "--data"]),
    "train": (unlearning_main, ["train", "ga", "--model", "demo:base", "--out", "run", "--forget"]),
    "quality": (unlearning_main, ["eval", "quality", "--model", "demo:base", "--out", "run", "--prompts"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_lines_refuse_with_2_and_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main, arguments = COMMANDS[command]
    half = '[{"question": "Who likes \\ud83d?", "answer": "Ana"}]'
    for text in (DEEP, f'[{{"question": {LONG_NUMBER}, "answer": "Oslo"}}]', half):
        path = tmp_path / "data.json"
        path.write_text(text)
        result = call_main(main, *arguments, path)
        assert result.code == 2 and result.out == ""
        (line,) = result.err.splitlines()
        assert str(path) in line and len(line) < 600
    assert not (tmp_path / "run").exists()
