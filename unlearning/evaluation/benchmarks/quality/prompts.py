"""Prompts that the model continues, and texts that were generated elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.question_answer import QUESTION_KEYS, Wrapping, label_of
from unlearning.data.records import Record, keys_of, read_records
from unlearning.data.sources import find_records
from unlearning.evaluation.metrics.text_quality import words

DOCUMENT_WORDS = 20
"""Number of words of a document without a prompt that are used as the prompt."""

TEXT_KEYS = ("generated", "generation", "text", "completion", "answer", "output", "response")
"""Keys under which a record may hold a generated text; the first that is present counts."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and the text that follows it if it was generated elsewhere.

    Attributes:
        prompt: Text that the model continues.
        text: Text that was generated elsewhere; None if the model is to write it.
        id: Identifier of the record.
        group: Group of the record, which the bootstrap draws whole.
    """

    prompt: str
    text: str | None = None
    id: str = ""
    group: str = ""


def read_prompts(
    source: str | Path,
    *,
    template: str | None = None,
    chat: ChatFormat | None = None,
    data_dir: str | Path | None = None,
) -> list[Asked]:
    """Read the prompts of a file or a named data set; answers are not needed and not read.

    Args:
        source: File of `question`, `prompt` or `text` records, or a name that `find_records` knows. Of a document,
            the first `DOCUMENT_WORDS` words are the prompt.
        template: Text around each question; None for the data set's own.
        chat: Chat format around each question, instead.
        data_dir: Directory that holds the named data sets.

    Returns:
        One entry per record with a prompt, in the order of the source.

    Raises:
        InputError: The source cannot be read, or a record has no prompt.
    """
    found = find_records(source, data_dir)
    wrapping = Wrapping(template or found.template, chat)
    asked = [
        _asked(record, wrapping, f"{found.source}, record {number}") for number, record in enumerate(found.records, 1)
    ]
    return [one for one in asked if one.prompt]


def read_texts(path: str | Path) -> list[Asked]:
    """Read generated texts: records with one of `TEXT_KEYS` (and `prompt`, `id`, `group`), or bare texts.

    Returns:
        One entry per record, in the same order.

    Raises:
        InputError: The file cannot be read, or a record has no text.
    """
    found = []
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}, record {number}"
        key = next((key for key in TEXT_KEYS if key in record), None)
        if key is None or not isinstance(record[key], str):
            raise InputError(f"{where}: must have a text under {', '.join(TEXT_KEYS)}; its keys are {keys_of(record)}")
        prompt = record.get("prompt")
        found.append(Asked(prompt if isinstance(prompt, str) else "", record[key], *_labels(record, where)))
    return found


def _asked(record: Record, wrapping: Wrapping, where: str) -> Asked:
    key = next((key for key in ("prompt", *QUESTION_KEYS, "text") if key in record), None)
    value = None if key is None else record[key]
    if not isinstance(value, str):
        raise InputError(f'{where}: must have "prompt", "question" or "text" with text; its keys are {keys_of(record)}')
    if key in QUESTION_KEYS:
        prompt = wrapping.question(value)
    else:
        prompt = wrapping.prompt(_beginning(value) if key == "text" else value)
    return Asked(prompt, None, *_labels(record, where))


def _labels(record: Record, where: str) -> tuple[str, str]:
    return label_of(record, "id", where), label_of(record, "group", where)


def _beginning(document: str) -> str:
    return " ".join(words(document)[:DOCUMENT_WORDS])
