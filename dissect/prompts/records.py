"""Read the formats of prompts: plain records, TOFU's, and ConceptVectors' JSON with the paper's prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.concept_vectors import ConceptRecord, has_questions, notebook_prompt
from unlearning.data.question_answer import DEFAULT_TEMPLATE
from unlearning.data.records import Record


@dataclass(frozen=True)
class Question:
    """A record of any format.

    Attributes:
        id: Identifier in result tables.
        group: The person, author or concept that the question is about, or "".
        prompt: Text before the answer.
        answer: Text of the answer, or None where the file gives none.
        row: ConceptVectors' prompt and continuation as one text, for the notebooks' protocol.
        n_answer_tokens: The released length of that continuation.
        wrong: The distractors that the file gives.
    """

    id: str
    group: str
    prompt: str
    answer: str | None
    row: str | None = None
    n_answer_tokens: int | None = None
    wrong: tuple[str, ...] = ()


def questions(
    records: list[Record],
    path: str | Path,
    template: str | None,
    chat: ChatFormat | None,
    *,
    verbatim_rows: bool,
) -> Iterator[Question]:
    """Read records of any known format.

    Args:
        records: The records of one file.
        path: The file's name, for messages.
        template: Wrapping of questions with `{question}`; None for each format's own.
        chat: The chat template that wraps questions instead, or None.
        verbatim_rows: Keep the released rows and lengths of ConceptVectors' JSON.

    Yields:
        The questions, in the order of the file.

    Raises:
        InputError: A record lacks a field, an answer is empty, or a row does not belong to its question.
    """
    for number, record in enumerate(records, start=1):
        if has_questions(record):
            yield from _concept_questions(record, path, number, template, chat, verbatim_rows)
            continue
        text = record.get("prompt", record.get("question"))
        if not isinstance(text, str) or not text.strip():
            keys = ", ".join(record) or "none"
            raise InputError(f'{path}, record {number}: needs "prompt" or "question" with text; its keys are {keys}')
        answer = record.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise InputError(f"{path}, record {number}: the answer is {type(answer).__name__}, not text; quote it")
        if answer is not None and not answer.strip():
            raise InputError(f"{path}, record {number}: the answer is empty; remove the record or give an answer")
        yield Question(
            id=str(record.get("id", number - 1)),
            group=str(record.get("group", "")),
            prompt=text if "prompt" in record and chat is None else _wrap(text, template, chat),
            answer=answer,
            wrong=_wrong_answers(record, path, number),
        )


def _wrong_answers(record: Record, path: str | Path, number: int) -> tuple[str, ...]:
    """Return a record's distractors, its `wrong` or, in TOFU's files, `perturbed_answer`."""
    key = next((key for key in ("wrong", "perturbed_answer") if record.get(key) is not None), None)
    answers = record[key] if key else []
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers):
        raise InputError(f"{path}, record {number}: {key} must be a list of non-empty texts; correct or remove it")
    return tuple(answers)


def _concept_questions(
    record: Record,
    path: str | Path,
    number: int,
    template: str | None,
    chat: ChatFormat | None,
    verbatim_rows: bool,
) -> Iterator[Question]:
    """Yield the questions of one ConceptVectors record (2406.11614; QA_with_answers is the Dissecting paper's)."""
    concept = ConceptRecord(record, f"{path}, record {number}")
    rows, lengths, answers = concept.questions_with_answers, concept.answer_lengths, concept.answers
    for index, question in enumerate(concept.questions):
        yield Question(
            id=f"{record.get('id', number - 1)}-{index}",
            group=str(number - 1) if concept.name is None else concept.name,
            prompt=notebook_prompt(question) if template is None and chat is None else _wrap(question, template, chat),
            answer=(answers[index] or None) if answers else None,
            row=rows[index] if rows is not None and verbatim_rows else None,
            n_answer_tokens=lengths[index] if lengths is not None and verbatim_rows else None,
        )


def _wrap(question: str, template: str | None, chat: ChatFormat | None) -> str:
    return (template or DEFAULT_TEMPLATE).replace("{question}", question) if chat is None else chat.prompt(question)
