"""Read the prompts of `behave`: forget prompts, retain prompts and texts to continue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from dissect.prompts.loading import continuations, load_prompts
from dissect.prompts.prompts import Prompt, Prompts
from dissect.prompts.records import questions
from unlearning.common.errors import InputError
from unlearning.data.chat import DEFAULT_CHAT_DATE, chat_format
from unlearning.data.concept_vectors import NOTEBOOK_TEMPLATE, ConceptRecord, has_questions
from unlearning.data.question_answer import label_of
from unlearning.data.records import Record, read_records
from unlearning.data.spans import encode_answer

if TYPE_CHECKING:
    from dissect.models.model import Model

FORGET, RETAIN, COMPLETION = "forget", "retain", "completion"
"""Names of the sets."""

_ANSWER_TOKENS = 30
"""Length of answers that the base model writes, in tokens, as in the released rows of ConceptVectors."""


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        template: Template of a question, with `{question}`; None for the default.
        chat: Use the tokenizer's chat template.
        answers: `given` in the file, or greedy continuations of the `base` model.
        limit: Largest number of prompts per file.
        chat_date: Date that the chat template writes as today's.
    """

    template: str | None = None
    chat: bool = False
    answers: Literal["given", "base"] = "given"
    limit: int | None = None
    chat_date: str = DEFAULT_CHAT_DATE


@dataclass(frozen=True)
class Sources:
    """Files of the three sets; a file of ConceptVectors has all three.

    Attributes:
        data: File of forget prompts.
        retain: File of retain prompts; None for those in `data`.
        completions: File of texts with their continuations; None for those in `data`, if there are any.
    """

    data: Path
    retain: Path | None = None
    completions: Path | None = None

    @property
    def has_own_retain(self) -> bool:
        """Whether the file of forget prompts has retain prompts too."""
        return bool(_unrelated_records(read_records(self.data), self.data))

    def check(self) -> None:
        """Check the files without a tokenizer, before models are loaded.

        Raises:
            InputError: A file cannot be read, or there are no retain prompts.
        """
        for path in (self.data, self.retain, self.completions):
            if path is not None:
                _completion_records(read_records(path), path)
        if self.retain is None and not self.has_own_retain:
            raise InputError(
                "`retain` is missing: name a file of retain prompts (.json or .jsonl). Only files of ConceptVectors "
                "have their own."
            )


@dataclass(frozen=True)
class Questions:
    """Sets of prompts.

    Attributes:
        forget: Forget prompts.
        retain: One or several sets of retain prompts, by name.
        completion: Texts to continue, or None.
        true_answers: Names of the sets whose answers are true, and not written by a model or the rest of a text.
    """

    forget: Prompts
    retain: Mapping[str, Prompts]
    completion: Prompts | None
    true_answers: tuple[str, ...]

    @property
    def by_name(self) -> dict[str, Prompts]:
        """All sets by name, in the order of the report."""
        last = {} if self.completion is None else {COMPLETION: self.completion}
        return {FORGET: self.forget, **self.retain, **last}


def read_questions(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, reading: Reading, *, answers_from: "Model"
) -> Questions:
    """Read, wrap and tokenise all sets.

    Args:
        sources: Files of the sets.
        tokenizer: Tokenizer of the models.
        reading: How to read the files.
        answers_from: Base model, which answers ConceptVectors' retain questions, and with `answers` base all questions.

    Returns:
        The sets.

    Raises:
        InputError: A file cannot be read, there are no retain prompts, or a prompt is wrong (see `load_prompts`).
    """
    sources.check()
    true_answers = []

    def load(name: str, path: Path) -> Prompts:
        if reading.answers == "given" and not any(map(has_questions, read_records(path))):
            true_answers.append(name)
        return load_prompts(
            path,
            tokenizer,
            template=reading.template,
            chat=reading.chat,
            chat_date=reading.chat_date,
            answers=reading.answers,
            answers_from=answers_from,
            max_new_tokens=_ANSWER_TOKENS,
            limit=reading.limit,
        )

    def encode(source: str, found: list[Record], how: Reading) -> Prompts:
        return _encode(found, source, tokenizer, how, answers_from)

    forget = load(FORGET, sources.data)
    if sources.retain is not None:
        retain = load(RETAIN, sources.retain)
    else:
        found = _unrelated_records(read_records(sources.data), sources.data)
        retain = encode(f"{sources.data} (unrelated_QA)", found, reading)
    completion = None
    place = sources.completions or sources.data
    if texts := _completion_records(read_records(place), place):
        completion = encode(f"{place} (text_completion)", texts, Reading(limit=reading.limit))
    elif sources.completions is not None:
        completion = load_prompts(place, tokenizer, template="{question}", limit=reading.limit)
    return Questions(forget, {RETAIN: retain}, completion, tuple(true_answers))


def _unrelated_records(records: Sequence[Record], path: Path) -> list[Record]:
    """Return the unrelated questions in ConceptVectors records, or an empty list for other records."""
    found = []
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number}"
        texts = ConceptRecord(record, where).unrelated_questions if has_questions(record) else []
        concept = label_of(record, "Concept", where, str(number - 1))
        name = label_of(record, "id", where, str(number - 1))
        found += [
            {"question": text, "group": concept, "id": f"{name}-unrelated-{index}"} for index, text in enumerate(texts)
        ]
    return found


def _completion_records(records: Sequence[Record], path: Path) -> list[Record]:
    """Return the texts in two halves, several per ConceptVectors record or one per record, or an empty list."""
    found = []
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number}"
        texts = ConceptRecord(record, where).halves
        group = label_of(record, "Concept", where, label_of(record, "group", where))
        name = label_of(record, "id", where, str(number - 1))
        for index, (first, second) in enumerate(texts):
            found.append({"prompt": first, "answer": second, "group": group, "id": f"{name}-text-{index}"})
    return found


def _encode(
    records: Sequence[Record], source: str, tokenizer: PreTrainedTokenizerBase, reading: Reading, model: "Model"
) -> Prompts:
    """Tokenise records that were extracted from a file, by default with the template of ConceptVectors."""
    template = None if reading.chat else reading.template or NOTEBOOK_TEMPLATE
    chat = chat_format(tokenizer, reading.chat_date) if reading.chat else None
    has_answers = all("answer" in record for record in records)
    raw = list(questions(list(records), source, template, chat, answers=has_answers))[: reading.limit]
    if has_answers:
        answers = [question.answer or "" for question in raw]
    else:
        answers = continuations(raw, tokenizer, model, _ANSWER_TOKENS, chat)
    items = []
    for question, answer in zip(raw, answers, strict=True):
        try:
            span = encode_answer(tokenizer, question.prompt, answer, chat=chat)
        except InputError as error:
            raise InputError(f"{source}, prompt {question.id}: {error}") from None
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=question.prompt,
                answer=answer,
                input_ids=tuple(span.input_ids),
                answer_start=span.answer_start,
                scored=range(span.answer_start - 1, len(span.input_ids) - 1),
            )
        )
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return Prompts(items=tuple(items), scoring="answer", pad_token_id=int(pad), source=source, chat=chat)
