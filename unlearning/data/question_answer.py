"""Question-answer records, prompts with continuations, and documents, as training examples."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.records import Record, read_records

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"

QUESTION_KEYS = ("question", "instruction")
"""Wrapped by the template; `prompt` is taken as it is."""

ANSWER_KEYS = ("answer", "completion", "output", "response", "gt")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that is trained or forgotten; an empty prompt makes the answer plain text.

    The two are joined by a single space where neither side has white space (`unlearning.data.spans.join_answer`).
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Wrapping:
    """What is put around questions: a template, or a chat.

    Raises:
        InputError: the template has no place for the question.
    """

    template: str = DEFAULT_TEMPLATE
    chat: ChatFormat | None = None

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise InputError(f"template {self.template!r} has no {{question}}; write for example {DEFAULT_TEMPLATE!r}")

    def question(self, text: str) -> str:
        """The prompt of a question."""
        if self.chat is not None:
            return self.chat.prompt(text)
        return self.template.replace("{question}", text)  # not str.format: a question may hold braces of its own

    def prompt(self, text: str) -> str:
        """A prompt that needs no wrapping, except in a chat."""
        return self.chat.prompt(text) if self.chat is not None and text else text


def read_examples(path: str | Path, template: str = DEFAULT_TEMPLATE) -> list[Example]:
    """Read `{"question", "answer"}`, `{"prompt", "answer"}` or `{"text"}` records from a file (see `read_records`).

    Args:
        path: the file; other keys of its records (TOFU's paraphrases, groups, ids) are passed over.
        template: wraps a question; must hold `{question}`. Prompts are taken as they are.

    Raises:
        InputError: the file is missing or broken (which line), a record lacks a prompt or an answer (which record),
            or the template has no place for the question.
    """
    wrapping = Wrapping(template)
    return examples_of(read_records(path), wrapping, source=str(path))


def examples_of(records: Iterable[Record], wrapping: Wrapping, *, source: str) -> list[Example]:
    """Records of any of the shapes as examples; documents without text are left out.

    Args:
        records: `question` or `instruction` (with an `input`, where there is one) are wrapped, `prompt` is not; the
            answer is the first of `ANSWER_KEYS` there is; a record with `text` alone is a document.
        wrapping: of questions.
        source: for messages.

    Raises:
        InputError: a record lacks a prompt or an answer, or has something else than text there (which record).
    """
    examples = (
        _example(record, wrapping, f"{source}, record {number}") for number, record in enumerate(records, start=1)
    )
    return [example for example in examples if example is not None]


def _example(record: Record, wrapping: Wrapping, where: str) -> Example | None:
    question = next((key for key in QUESTION_KEYS if key in record), None)
    if "prompt" in record:
        prompt = wrapping.prompt(_text(record, "prompt", where))
    elif question is not None:
        text = _text(record, question, where)
        if question == "instruction" and record.get("input"):
            text = f"{text}\n\n{_text(record, 'input', where)}"
        prompt = wrapping.question(text)
    elif "text" in record:
        text = _text(record, "text", where)
        return Example(prompt="", answer=text) if text.strip() else None
    else:
        keys = ", ".join(sorted(record)) or "none"
        raise InputError(f'{where}: needs "question" or "prompt", and "answer", or "text"; its keys are {keys}')
    key = next((key for key in ANSWER_KEYS if key in record), None)
    if key is None:
        raise InputError(f'{where}: "answer" is missing; its keys are {", ".join(sorted(record))}')
    answer = _text(record, key, where)
    if not answer.strip():
        raise InputError(f"{where}: the answer is empty; remove the record or give an answer")
    return Example(prompt=prompt, answer=answer)


def _text(record: Record, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" should be text, got {type(value).__name__}')
    return value
