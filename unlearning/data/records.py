"""Records from JSON, JSON lines, CSV or parquet, with errors that name the line or the record."""

import json
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError
from unlearning.data.tables import read_csv, read_parquet

Record = dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """Read a JSON list of objects, JSON lines, a CSV or TSV file with a header, or a parquet file.

    Args:
        path: The file. A JSON text in place of an object is a document: the record `{"text": ...}`.

    Returns:
        One dictionary per record; of a CSV file all values are text.

    Raises:
        InputError: The file is missing, empty or not UTF-8, or a line is broken (the message names it).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a .json or .jsonl file in it")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_csv(path)
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a JSON list or JSON lines")
    if text.lstrip().startswith("["):
        return _json_list(path, text)
    return _json_lines(path, text)


def read_text(path: Path) -> str:
    """Read a file's text, without a byte order mark.

    Args:
        path: The file.

    Returns:
        The text.

    Raises:
        InputError: The file is missing, not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _json_list(path: Path, text: str) -> list[Record]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    if not values:
        raise InputError(f"{path}: the list is empty")
    return [_record(value, f"{path}, record {number}") for number, value in enumerate(values, start=1)]


def _json_lines(path: Path, text: str) -> list[Record]:
    records: list[Record] = []
    # Not str.splitlines, which also splits at separators that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if not records and _is_json(text):
                raise InputError(
                    f"{path}: one JSON object over several lines; write a list of objects, or one object per line"
                ) from None
            raise InputError(f"{path}, line {number}: broken JSON: {error.msg}") from None
        records.append(_record(value, f"{path}, line {number}"))
    return records


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _record(value: Any, where: str) -> Record:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {type(value).__name__}")
    return value
