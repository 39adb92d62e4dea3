"""Read the formats of prompts: plain records, TOFU's, and ConceptVectors' JSON with the paper's prompts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.concept_vectors import ConceptRecord, has_questions, notebook_prompt
from unlearning.data.question_answer import (
    ANSWER_KEYS,
    DEFAULT_TEMPLATE,
    answer_of,
    bare,
    check_length,
    label_of,
    texts_of,
)
from unlearning.data.records import Record, keys_of


@dataclass(frozen=True)
class Question:
    """A record of any format.

    Attributes:
        id: Identifier in result tables.
        group: The person, author or concept that the question is about, or "".
        prompt: Text before the answer.
        answer: Text of the answer; None if answers are not read.
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
    verbatim_rows: bool = False,
    answers: bool = True,
) -> Iterator[Question]:
    """Read records of any known format.

    Args:
        records: The records of one file.
        path: The file's name, for messages.
        template: Wrapping of questions with `{question}`; None for each format's own.
        chat: The chat template that wraps questions instead, or None.
        verbatim_rows: Keep the released rows and lengths of ConceptVectors' JSON.
        answers: Read the answers, which every record must have.

    Yields:
        The questions, in the order of the file.

    Raises:
        InputError: A record lacks a field, its answer is missing, empty or among its wrong answers, its id is another
            record's, or a row does not belong to its question.
    """
    holders: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number}"
        found: Iterable[Question] = (
            _concept_questions(record, where, number, template, chat, verbatim_rows, answers)
            if has_questions(record)
            else [_plain_question(record, where, number, template, chat, answers)]
        )
        for question in found:
            if question.id in holders:
                raise InputError(
                    f"{where}: has the id {question.id[:40]!r} of record {holders[question.id]}; give each its own (a "
                    "record without an id has its place in the file, from 0)"
                )
            holders[question.id] = number
            yield question


def _plain_question(
    record: Record, where: str, number: int, template: str | None, chat: ChatFormat | None, with_answers: bool
) -> Question:
    text = record.get("prompt", record.get("question"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: needs "prompt" or "question" with text; its keys are {keys_of(record)}')
    check_length(text, "prompt" if "prompt" in record else "question", where)
    answer = _answer(record, where) if with_answers else None
    return Question(
        id=label_of(record, "id", where, str(number - 1)),
        group=label_of(record, "group", where),
        prompt=text if "prompt" in record and chat is None else _wrap(text, template, chat),
        answer=answer,
        wrong=_wrong_answers(record, answer, where),
    )


def _answer(record: Record, where: str) -> str:
    """Return the answer of a record.

    Args:
        record: The record.
        where: File and record, for messages.

    Returns:
        The answer.

    Raises:
        InputError: There is none; the message names the option that lets the base answer.
    """
    try:
        return answer_of(record, where)
    except InputError as error:
        if any(record.get(key) is not None for key in ANSWER_KEYS):
            raise
        raise InputError(f"{error}; or set `answers` to base, and the base model answers every prompt") from None


def _wrong_answers(record: Record, answer: str | None, where: str) -> tuple[str, ...]:
    """Return a record's distractors, its `wrong` or, in TOFU's files, `perturbed_answer`; a text twice counts once."""
    key = next((key for key in ("wrong", "perturbed_answer") if record.get(key) not in (None, "")), None)
    if key is None:
        return ()
    different: dict[str, str] = {}
    for text in texts_of(record, key, where):
        different.setdefault(bare(text), text)
    if answer is not None and bare(answer) in different:
        raise InputError(
            f"{where}: the answer is also among the wrong ones ({key} has {different[bare(answer)][:40]!r}), where it "
            "would be ranked against itself; remove it there"
        )
    return tuple(different.values())


def _concept_questions(
    record: Record,
    where: str,
    number: int,
    template: str | None,
    chat: ChatFormat | None,
    verbatim_rows: bool,
    with_answers: bool,
) -> Iterator[Question]:
    """Yield the questions of one ConceptVectors record (2406.11614; QA_with_answers is the Dissecting paper's)."""
    concept = ConceptRecord(record, where)
    rows, lengths = concept.questions_with_answers, concept.answer_lengths
    answers = concept.answers if with_answers else None
    name = label_of(record, "id", where, str(number - 1))
    for index, question in enumerate(concept.questions):
        if with_answers and not (answers and answers[index]):
            raise InputError(
                f"{where}, question {index}: there is no answer under QA_with_answers; set `answers` to base, and the "
                "base model answers every prompt"
            )
        yield Question(
            id=f"{name}-{index}",
            group=str(number - 1) if concept.name is None else concept.name,
            prompt=notebook_prompt(question) if template is None and chat is None else _wrap(question, template, chat),
            answer=answers[index] if answers else None,
            row=rows[index] if rows is not None and verbatim_rows else None,
            n_answer_tokens=lengths[index] if lengths is not None and verbatim_rows else None,
        )


def _wrap(question: str, template: str | None, chat: ChatFormat | None) -> str:
    return (template or DEFAULT_TEMPLATE).replace("{question}", question) if chat is None else chat.prompt(question)
