"""Multiple-choice questions from files, from WMDP, and from the hub."""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError, nearest
from unlearning.common.places import is_directory, is_there
from unlearning.data import hub, wmdp_questions
from unlearning.data.named import data_directory, read_files
from unlearning.data.question_answer import label_of
from unlearning.data.records import Record, keys_of, read_records

LETTERS = string.ascii_uppercase
"""Names of a question's options, and thus their maximum number."""

_CHOICES_KEYS = ("choices", "options")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        text: The question.
        choices: Its options, 2 to 26.
        answer: Index of the right option.
        subject: Subject that the prompt names; empty if it names none.
        id: Id of the record, or "".
        group: Group of the record, or "".
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    id: str = ""
    group: str = ""


def read_questions(
    source: str | Path, *, data_dir: str | Path | None = None, subject: str | None = None
) -> list[Question]:
    """Read the questions of a file or of a named set.

    Args:
        source: A file (.json, .jsonl, .csv, .tsv, .parquet), `wmdp:bio`, `wmdp:chem`, `wmdp:cyber`, or
            `hub:owner/name:config:split`. MMLU's own .csv files, which have no header, are read too.
        data_dir: Directory of named sets, asked before the hub; None takes $DISSECT_DATA.
        subject: Subject of all questions; None takes each record's (`subject`), or the one of WMDP's set.

    Returns:
        The questions, in the order of the source.

    Raises:
        InputError: The file or set does not exist, or a record is not a multiple-choice question (the message names
            it).
    """
    name = str(source)
    prefix, colon, rest = name.partition(":")
    if not colon or is_there(source):
        return questions_of(_with_header(Path(source)), source=name, subject=subject)
    if prefix == "wmdp":
        records = wmdp_questions.read(rest, data_directory(data_dir))
        return questions_of(records, source=name, subject=subject or wmdp_questions.SUBJECTS[rest])
    if prefix == "hub":
        part = hub.read_name(rest)
        local = Path(part.repository)
        files = hub.find_files(part, local if is_directory(local) else None)
        return questions_of(read_files(files), source=name, subject=subject)
    hint = nearest(prefix, ("wmdp", "hub")) or ";"
    raise InputError(f"{name}: no such file{hint} name a file, wmdp:bio, wmdp:chem, wmdp:cyber or hub:owner/name")


def questions_of(records: list[Record], *, source: str, subject: str | None = None) -> list[Question]:
    """Turn records into questions.

    A record has `question`, its options under `choices` (or `options`) or one under each of `A`, `B`, ..., and
    `answer`: the index of the right option, from 0, or its letter.

    Args:
        records: The records.
        source: Name of their source, for messages.
        subject: Subject of all questions; None takes each record's.

    Returns:
        The questions, in the order of the records.

    Raises:
        InputError: A record lacks a key, or its answer is not among its options (the message names the record).
    """
    return [_question(record, f"{source}, record {number}", subject) for number, record in enumerate(records, start=1)]


def _question(record: Record, where: str, subject: str | None) -> Question:
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: needs its question as text under "question"; its keys are {keys_of(record)}')
    choices = _choices(record, where)
    about = subject if subject is not None else label_of(record, "subject", where).replace("_", " ")
    id, group = (label_of(record, key, where) for key in ("id", "group"))
    return Question(text, choices, _answer(record.get("answer"), len(choices), where), about, id, group)


def _choices(record: Record, where: str) -> tuple[str, ...]:
    key = next((key for key in _CHOICES_KEYS if key in record), None)
    if key is not None:
        values = record[key]
    else:
        present = [letter in record for letter in LETTERS]
        values = [record[letter] for letter in LETTERS[: present.index(False) if False in present else None]]
        if not values:
            raise InputError(f'{where}: needs its options under "choices", or under "A", "B", ...')
    if not isinstance(values, list):
        raise InputError(f'{where}: "{key}" must be a list of texts, got {type(values).__name__}')
    if not 2 <= len(values) <= len(LETTERS):
        raise InputError(f"{where}: a question has 2 to {len(LETTERS)} options, this one {len(values)}")
    for letter, value in zip(LETTERS, values, strict=False):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{where}: option {letter} must be text, got {type(value).__name__}")
    return tuple(map(str, values))


def _answer(value: Any, n_choices: int, where: str) -> int:
    last = LETTERS[n_choices - 1]
    if value is None or value == "":
        raise InputError(f'{where}: "answer" is missing; give the right option\'s index (from 0) or its letter')
    if isinstance(value, str):
        written = value.strip()
        if len(written) == 1 and written.upper() in LETTERS:
            index = LETTERS.index(written.upper())
        else:
            index = int(written) if written.isdecimal() else -1
    else:
        index = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if not 0 <= index < n_choices:
        raise InputError(
            f"{where}: the answer {repr(value)[:40]} is no option; give 0 to {n_choices - 1}, or A to {last}"
        )
    return index


def _with_header(path: Path) -> list[Record]:
    """Read a file's records; MMLU's .csv files have no header, and hold question, four options, letter."""
    records = read_records(path)
    first = list(records[0])
    if path.suffix.lower() != ".csv" or "question" in first or len(first) < 4 or first[-1] not in LETTERS:
        return records
    header = ["question", *LETTERS[: len(first) - 2], "answer"]
    rows = [first, *(list(record.values()) for record in records)]
    return [dict(zip(header, row, strict=True)) for row in rows]
