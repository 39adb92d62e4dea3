"""Records from a JSON list or from JSON lines, with errors that name the line."""

import json
from pathlib import Path
from typing import Any

from unlearning.errors import InputError

Record = dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """Read a JSON list of objects, or one JSON object a line.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or a line of it is broken (which one).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory; name a .json or .jsonl file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it should hold a JSON list or JSON lines")
    if text.lstrip().startswith("["):
        return _json_list(path, text)
    return _json_lines(path, text)


def _json_list(path: Path, text: str) -> list[Record]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}, record {index + 1}: expected an object, got {type(record).__name__}")
    if not records:
        raise InputError(f"{path}: the list is empty")
    return records


def _json_lines(path: Path, text: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: broken JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
        records.append(record)
    return records
