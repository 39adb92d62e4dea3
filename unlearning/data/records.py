"""Records from JSON, JSON lines, CSV or parquet, with errors that name the line or the record."""

import json
import math
import re
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError
from unlearning.data.tables import check_count, read_csv, read_parquet

Record = dict[str, Any]

_SURROGATE = re.compile(r"[\ud800-\udfff]")

_SIGNATURES = {"PAR1": "parquet", "%PDF-": "PDF", "{\\rtf": "RTF", "PK\x03\x04": "zip or office"}
"""First characters of files of other formats, which decode as text up to their first special byte."""

MAX_DEPTH = 64
"""Maximum number of lists and objects inside each other."""

MAX_CHARACTERS = 10_000_000
"""Maximum length of one text, such as a book; to tokenise it takes up to 200 bytes and 2 microseconds a character."""


def read_records(path: str | Path) -> list[Record]:
    """Read a JSON list of objects, JSON lines, a CSV or TSV file with a header, or a parquet file.

    Args:
        path: The file. A JSON text in place of an object is a document: the record `{"text": ...}`.

    Returns:
        One dictionary per record; of a CSV file all values are text.

    Raises:
        InputError: The file is missing, empty, no regular file, or not UTF-8; a line is broken; or a record is nested
            too deep, has a key twice, or holds half a character, a NUL or a text of more than `MAX_CHARACTERS` (the
            message names line or record).
    """
    path = Path(path)
    check_regular(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _checked(read_csv(read_text(path, newline=""), path), f"{path}, record")
    if path.suffix.lower() == ".parquet":
        return _checked(read_parquet(path), f"{path}, record")
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a JSON list or JSON lines")
    if text.lstrip().startswith("["):
        return _json_list(path, text)
    return _json_lines(path, text)


def check_regular(path: Path) -> None:
    """Check that a path is a regular file: to read a pipe or a device may wait for ever.

    Args:
        path: The path.

    Raises:
        InputError: There is no such file, it is something else, or its directory may not be read.
    """
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if path.is_dir():
            raise InputError(f"{path}: is a directory; name a .json or .jsonl file in it")
        if not path.is_file():
            raise InputError(f"{path}: is a pipe, a socket or a device; write its content to a file and name that")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: Path, *, newline: str | None = None) -> str:
    """Read a file's text, without a byte order mark.

    Args:
        path: The file.
        newline: Treatment of line breaks, as `open` takes it: None makes all of them line feeds, "" keeps them.

    Returns:
        The text.

    Raises:
        InputError: The file is missing, no regular file, not UTF-8, holds a NUL (as binary files and UTF-16 do) or
            begins as a file of another format, or cannot be read.
    """
    check_regular(path)
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    kind = next((kind for signature, kind in _SIGNATURES.items() if text.startswith(signature)), None)
    if kind is not None:
        raise InputError(f"{path}: begins as a {kind} file does, not as text; write it as UTF-8 text")
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise InputError(f"{path}, line {line}: holds a NUL, as binary files and UTF-16 do; write it as UTF-8 text")
    return text


def read_json(text: str) -> Any:
    """Parse a JSON text from a stranger.

    Args:
        text: The text.

    Returns:
        Its value.

    Raises:
        json.JSONDecodeError: The text is not JSON; also if it is nested too deep, an object has a key twice, or a
            number has thousands of digits, is NaN or infinite, or too large.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise json.JSONDecodeError(f"nested deeper than {MAX_DEPTH} lists and objects", text, 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        reason = "a number has thousands of digits" if "digits" in str(error) else str(error)
        raise json.JSONDecodeError(reason, text, 0) from None


def keys_of(record: Record) -> str:
    """Return the keys of a record for a message; the first ones if there are many."""
    keys = [str(key) if len(str(key)) <= 40 else f"{str(key)[:37]}..." for key in list(record)[:12]]
    return ", ".join([*keys, "..."] if len(record) > 12 else keys) or "none"


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found: Record = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key[:40]}" is there twice')
        found[key] = value
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON; write a number, or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


def _json_list(path: Path, text: str) -> list[Record]:
    try:
        values = read_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    if not values:
        raise InputError(f"{path}: the list is empty")
    check_count(len(values), path)
    return _checked(values, f"{path}, record")


def _json_lines(path: Path, text: str) -> list[Record]:
    values: list[Any] = []
    # Not str.splitlines, which also splits at separators that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except json.JSONDecodeError as error:
            if not values and _is_json(text):
                raise InputError(
                    f"{path}: one JSON object over several lines; write a list of objects, or one object per line"
                ) from None
            raise InputError(f"{path}, line {number}: broken JSON: {error.msg}") from None
        check_count(len(values) + 1, path)
        values += _checked([value], f"{path}, line", first=number)
    return values


def _is_json(text: str) -> bool:
    try:
        read_json(text)
    except json.JSONDecodeError:
        return False
    return True


def _checked(values: list[Any], place: str, *, first: int = 1) -> list[Record]:
    """Return values as records, after a check of everything in them."""
    records = []
    for number, value in enumerate(values, start=first):
        if not isinstance(value, dict | str):
            raise InputError(f"{place} {number}: expected an object, got {type(value).__name__}")
        if fault := _fault(value):
            raise InputError(f"{place} {number}: {fault}")
        records.append({"text": value} if isinstance(value, str) else value)
    return records


def fault_of_text(text: str) -> str:
    """Return what no text of a record may hold, such as half a surrogate pair or a NUL; empty if it holds none."""
    # No text of a tokenizer or a file may hold a surrogate; `json` reads it from an escape such as \ud83d.
    if not text.isascii() and (half := _SURROGATE.search(text)):
        return f"holds half a character (\\u{ord(half[0]):04x}), as a cut text does; write the whole one"
    if "\0" in text:
        return "holds a NUL, as binary data and UTF-16 do; write UTF-8 text"
    if len(text) > MAX_CHARACTERS:
        return f"holds a text of {len(text)} characters, more than {MAX_CHARACTERS}; cut it into several"
    return ""


def _fault(value: Any) -> str:
    """Return what no record may hold: a text with a fault, or too deep a nesting; empty if there is neither."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if fault := fault_of_text(item):
                    return fault
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
        if not below:
            return ""
        level = below
    return f"is nested deeper than {MAX_DEPTH} lists and objects"
