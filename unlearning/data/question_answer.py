"""Question-answer and prompt-answer records as training examples."""

from dataclasses import dataclass
from pathlib import Path

from unlearning.data.records import Record, read_records
from unlearning.errors import InputError

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that is trained or forgotten; an empty prompt makes the answer plain text.

    The two are joined by a single space where neither side has white space (`unlearning.data.spans.join_answer`).
    """

    prompt: str
    answer: str


def read_examples(path: str | Path, template: str = DEFAULT_TEMPLATE) -> list[Example]:
    """Read `{"question", "answer"}` or `{"prompt", "answer"}` records from a JSON list or from JSON lines.

    Args:
        path: the file; other keys of its records (TOFU's paraphrases, groups, ids) are passed over.
        template: wraps a question; must hold `{question}`. Prompts are taken as they are.

    Raises:
        InputError: the file is missing or broken (which line), a record lacks a prompt or an answer (which record),
            or the template has no place for the question.
    """
    if "{question}" not in template:
        raise InputError(f"template {template!r} has no {{question}}; write for example {DEFAULT_TEMPLATE!r}")
    return [_example(record, template, f"{path}, record {number}") for number, record in _numbered(path)]


def _numbered(path: str | Path) -> list[tuple[int, Record]]:
    return list(enumerate(read_records(path), start=1))


def _example(record: Record, template: str, where: str) -> Example:
    if "prompt" in record:
        prompt = _text(record, "prompt", where)
    elif "question" in record:
        # Not str.format: a question may hold braces of its own.
        prompt = template.replace("{question}", _text(record, "question", where))
    else:
        keys = ", ".join(sorted(record)) or "none"
        raise InputError(f'{where}: needs "question" or "prompt", and "answer"; its keys are {keys}')
    answer = _text(record, "answer", where)
    if not answer.strip():
        raise InputError(f"{where}: the answer is empty; remove the record or give an answer")
    return Example(prompt=prompt, answer=answer)


def _text(record: Record, key: str, where: str) -> str:
    if key not in record:
        raise InputError(f'{where}: "{key}" is missing')
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" should be text, got {type(value).__name__}')
    return value
