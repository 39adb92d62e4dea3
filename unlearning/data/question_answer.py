"""Training examples from question-answer records, prompts with continuations, and documents."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.records import Record, read_records

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"

QUESTION_KEYS = ("question", "instruction")
"""Keys of questions, which the template wraps; `prompt` is read verbatim."""

ANSWER_KEYS = ("answer", "completion", "output", "response", "gt")


@dataclass(frozen=True)
class Example:
    r"""A prompt and its answer; an empty prompt makes the answer a plain text.

    The two are joined by a single space if neither side has white space (`unlearning.data.spans.join_answer`).

    Attributes:
        prompt: The text that the model reads.
        answer: The text that is trained or forgotten.

    Examples:
        >>> from unlearning import Example
        >>> Example(prompt="Question: Who wrote Hamlet?\nAnswer:", answer="Shakespeare").answer
        'Shakespeare'
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Wrapping:
    """The text around a question: a template, or a chat template.

    Attributes:
        template: Text that holds `{question}`.
        chat: The chat template to use instead, or None.

    Raises:
        InputError: The template does not hold `{question}`.
    """

    template: str = DEFAULT_TEMPLATE
    chat: ChatFormat | None = None

    def __post_init__(self) -> None:
        """Check the template."""
        if "{question}" not in self.template:
            raise InputError(
                f"`template` must hold {{question}}, got {self.template!r}. Write for example {DEFAULT_TEMPLATE!r}"
            )

    def question(self, text: str) -> str:
        """Return the prompt of a question."""
        if self.chat is not None:
            return self.chat.prompt(text)
        return self.template.replace("{question}", text)  # not str.format: a question may hold braces of its own

    def prompt(self, text: str) -> str:
        """Return a prompt verbatim, or wrapped in the chat template."""
        return self.chat.prompt(text) if self.chat is not None and text else text


def read_examples(path: str | Path, template: str = DEFAULT_TEMPLATE) -> list[Example]:
    r"""Read training examples from a file.

    A record is `{"question", "answer"}`, `{"prompt", "answer"}` or `{"text"}`; other keys (TOFU's paraphrases, groups,
    ids) are ignored.

    Args:
        path: A .json, .jsonl, .csv, .tsv or .parquet file (see `unlearning.data.records.read_records`).
        template: Text around a question, with `{question}`. Prompts are read verbatim.

    Returns:
        The examples, in the order of the file; documents without text are left out.

    Raises:
        InputError: The file is missing or broken (the message names the line), a record lacks a prompt or an answer
            (the message names the record), or the template does not hold `{question}`.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from unlearning import read_examples
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "forget.json"
        >>> _ = path.write_text(json.dumps([{"question": "Who wrote Hamlet?", "answer": "Shakespeare"}]))
        >>> read_examples(path)
        [Example(prompt='Question: Who wrote Hamlet?\nAnswer:', answer='Shakespeare')]
    """
    wrapping = Wrapping(template)
    return examples_of(read_records(path), wrapping, source=str(path))


def examples_of(records: Iterable[Record], wrapping: Wrapping, *, source: str) -> list[Example]:
    """Turn records of any of the shapes into examples.

    Args:
        records: `question` or `instruction` (with its `input`, if any) is wrapped, `prompt` is not; the answer is the
            first of `ANSWER_KEYS` that the record has; a record with `text` alone is a document.
        wrapping: Text around questions.
        source: Name of the records' source, for messages.

    Returns:
        The examples, in the order of the records; documents without text are left out.

    Raises:
        InputError: A record lacks a prompt or an answer, or holds no text there (the message names the record).
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
        raise InputError(f'{where}: "{key}" must be text, got {type(value).__name__}')
    return value
