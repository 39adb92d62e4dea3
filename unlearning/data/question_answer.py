"""Training examples from question-answer records, prompts with continuations, and documents."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.records import Record, keys_of, read_records

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"

QUESTION_KEYS = ("question", "instruction")
"""Keys of questions, which the template wraps; `prompt` is read verbatim."""

ANSWER_KEYS = ("answer", "completion", "output", "response", "gt")
"""Keys of answers, in both packages; the first that a record has counts."""

MAX_TEMPLATE = 100_000
"""Maximum number of characters of a template."""

MAX_PROMPT = 2_000_000
"""Maximum number of characters of a question, a prompt or an answer; far more than any model reads."""


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
        check_template(self.template)

    def question(self, text: str) -> str:
        """Return the prompt of a question."""
        if self.chat is not None:
            return self.chat.prompt(text)
        return self.template.replace("{question}", text)  # not str.format: a question may hold braces of its own

    def prompt(self, text: str) -> str:
        """Return a prompt verbatim, or wrapped in the chat template."""
        return self.chat.prompt(text) if self.chat is not None and text else text


def check_template(template: str) -> None:
    """Check that a template can wrap questions.

    Args:
        template: Text around a question.

    Raises:
        InputError: It does not hold `{question}`, is too long, or is no text.
    """
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"`template` must have at most {MAX_TEMPLATE} characters, got {len(template)}. Shorten it.")
    if "{question}" not in template:
        raise InputError(f"`template` must hold {{question}}, got {template!r}. Write for example {DEFAULT_TEMPLATE!r}")
    try:
        template.encode()
    except UnicodeEncodeError:
        raise InputError(f"`template` must be UTF-8 text, got {template!r}") from None


def answer_of(record: Record, where: str) -> str:
    """Return the answer of a record, under the first of `ANSWER_KEYS` that it has.

    Args:
        record: The record.
        where: File and record, for messages.

    Returns:
        The answer, which is not empty.

    Raises:
        InputError: The record has none, or it is null, empty or no text.
    """
    key = next((key for key in ANSWER_KEYS if key in record), None)
    if key is None:
        some = ", ".join(f'"{name}"' for name in ANSWER_KEYS)
        raise InputError(f"{where}: the answer is missing; give it under {some}. Its keys are {keys_of(record)}")
    if record[key] is None:
        raise InputError(f'{where}: "{key}" is null; give an answer. The keys are {keys_of(record)}')
    answer = text_of(record, key, where)
    if not answer.strip():
        raise InputError(f"{where}: the answer is empty; remove the record or give an answer")
    return answer


def text_of(record: Record, key: str, where: str) -> str:
    """Return the text under a key of a record.

    Args:
        record: The record.
        key: The key, which it has.
        where: File and record, for messages.

    Returns:
        The text.

    Raises:
        InputError: The value is no text, or too long a one for anything but a document.
    """
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" must be text, got {type(value).__name__}; quote it')
    if key != "text":
        check_length(value, key, where)
    return value


def check_length(text: str, key: str, where: str) -> None:
    """Check that a text of a prompt or an answer is not too long to be tokenised in seconds.

    Args:
        text: The text.
        key: Its key in the record.
        where: File and record, for messages.

    Raises:
        InputError: It has more than `MAX_PROMPT` characters.
    """
    if len(text) > MAX_PROMPT:
        raise InputError(
            f'{where}: "{key}" has {len(text)} characters, more than {MAX_PROMPT}; shorten it, or give it as "text" to '
            "train on a document"
        )


def texts_of(record: Record, key: str, where: str) -> list[str]:
    """Return the texts under a key of a record, such as its distractors.

    Args:
        record: The record.
        key: The key, which it has.
        where: File and record, for messages.

    Returns:
        The texts; one text alone is a list of one.

    Raises:
        InputError: The value is something else, a text is empty, or a list is written as one text, as in a CSV file.
    """
    values = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(text, str) and text.strip() for text in values):
        raise InputError(f"{where}: {key} must be a list of non-empty texts; correct or remove it")
    for text in values:
        check_length(text, key, where)
    if any(map(_is_written_list, values)):
        raise InputError(
            f"{where}: {key} is a list that is written as text ({values[0][:40]!r}); write a JSON file with a list"
        )
    return values


def bare(text: str) -> str:
    """Return a text in the form in which two texts are compared: composed (NFC), without outer white space."""
    return unicodedata.normalize("NFC", text).strip()


def _is_written_list(text: str) -> bool:
    """Return whether a text is a list of quoted texts, as JSON or Python write it."""
    text = text.strip()
    inside = text.strip("[] \n\t,")
    return text.startswith("[") and text.endswith("]") and inside[:1] in ('"', "'") and inside[-1:] == inside[:1]


def label_of(record: Record, key: str, where: str, default: str = "") -> str:
    """Return the text or number under a key of a record that names it, such as `id` or `group`.

    Args:
        record: The record.
        key: The key.
        where: File and record, for messages.
        default: Label of a record without the key, or with null.

    Returns:
        The label.

    Raises:
        InputError: The value is something else, also NaN or infinite, as a parquet file may hold.
    """
    value = record.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f'{where}: "{key}" must be text or a number, got {type(value).__name__}')
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'{where}: "{key}" must be text or a finite number, got {value}')
    return str(value)


def unused_template(records: Sequence[Record], template: str | None) -> str | None:
    """Return a sentence that says which records a template does not wrap.

    Args:
        records: The records.
        template: The template that the user set; None for none.

    Returns:
        The sentence; None if the template wraps all records with a prompt or a question.
    """
    verbatim = sum("prompt" in record for record in records)
    if template in (None, "{question}") or not verbatim:
        return None
    return (
        f"`template` is not used for {verbatim} of the {len(records)} records: their text is under `prompt`, which is "
        "read as it is; under `question` it would be wrapped"
    )


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
        prompt = wrapping.prompt(text_of(record, "prompt", where))
    elif question is not None:
        text = text_of(record, question, where)
        if not text.strip():
            raise InputError(f'{where}: "{question}" is empty; remove the record or give a question')
        if question == "instruction" and record.get("input"):
            text = f"{text}\n\n{text_of(record, 'input', where)}"
        prompt = wrapping.question(text)
    elif "text" in record:
        text = text_of(record, "text", where)
        return Example(prompt="", answer=text) if text.strip() else None
    else:
        raise InputError(
            f'{where}: needs "question" or "prompt", and "answer", or "text"; its keys are {keys_of(record)}'
        )
    return Example(prompt=prompt, answer=answer_of(record, where))
