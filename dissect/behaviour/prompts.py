"""What `behave` asks: forget questions, retain questions, and texts to go on with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompt, Prompts
from dissect.prompts.records import questions
from unlearning.common.errors import InputError
from unlearning.data.chat import chat_format
from unlearning.data.concept_vectors import NOTEBOOK_TEMPLATE, ConceptRecord, cut_continuation, has_questions
from unlearning.data.records import Record, read_records
from unlearning.data.spans import encode_answer

if TYPE_CHECKING:
    from dissect.models.model import Model

FORGET, RETAIN, COMPLETION = "forget", "retain", "completion"

_ANSWER_TOKENS = 30
"""Length of the answers that the base model writes where a file has none, as in ConceptVectors' released rows."""


@dataclass(frozen=True)
class Reading:
    """How files are read; as in `load_prompts`."""

    template: str | None = None
    chat: bool = False
    answers: Literal["given", "base"] = "given"
    limit: int | None = None


@dataclass(frozen=True)
class Sources:
    """Where the three sets come from; ConceptVectors' JSON holds all three.

    Attributes:
        data: file of forget questions.
        retain: file of retain questions; None takes `data`'s own.
        completions: file of texts and their continuations; None takes `data`'s own where it has some.
    """

    data: Path
    retain: Path | None = None
    completions: Path | None = None

    @property
    def has_own_retain(self) -> bool:
        """Whether the file of forget questions holds retain questions too."""
        return bool(_unrelated_records(read_records(self.data), self.data))

    def check(self) -> None:
        """Read the files without a tokenizer, to tell of what is wrong before models are loaded.

        Raises:
            InputError: a file that cannot be read, or no retain questions anywhere.
        """
        for path in (self.data, self.retain, self.completions):
            if path is not None:
                _completion_records(read_records(path), path)
        if self.retain is None and not self.has_own_retain:
            raise InputError(
                "`retain` is missing: name a file of questions about what is to stay (.json or .jsonl); only "
                "ConceptVectors' JSON brings its own"
            )


@dataclass(frozen=True)
class Questions:
    """The sets of prompts that are compared.

    Attributes:
        forget: about what was to be forgotten.
        retain: about what is to stay, one set or several, by name.
        completion: texts to go on with, or None.
        true_answers: names of the sets whose answers are true ones, and not what a model wrote or how a text goes on.
    """

    forget: Prompts
    retain: Mapping[str, Prompts]
    completion: Prompts | None
    true_answers: tuple[str, ...]

    @property
    def by_name(self) -> dict[str, Prompts]:
        """Every set, in the order of the report."""
        last = {} if self.completion is None else {COMPLETION: self.completion}
        return {FORGET: self.forget, **self.retain, **last}


def read_questions(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, reading: Reading, *, answers_from: "Model"
) -> Questions:
    """Read, wrap and tokenise all sets; where a file has no answers, the base model's own are taken.

    Raises:
        InputError: what `load_prompts` and `Sources.check` raise.
    """
    sources.check()
    true_answers = []

    def load(name: str, path: Path) -> Prompts:
        if reading.answers == "given" and all(_has_answer(record) for record in read_records(path)):
            true_answers.append(name)
        return load_prompts(
            path,
            tokenizer,
            template=reading.template,
            chat=reading.chat,
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
        completion = load_prompts(
            place, tokenizer, template="{question}", answers_from=answers_from, limit=reading.limit
        )
    return Questions(forget, {RETAIN: retain}, completion, tuple(true_answers))


def _has_answer(record: Record) -> bool:
    return isinstance(record.get("answer"), str)


def _unrelated_records(records: Sequence[Record], path: Path) -> list[Record]:
    """The unrelated questions of ConceptVectors records; none where the records are others."""
    found = []
    for number, record in enumerate(records, start=1):
        texts = ConceptRecord(record, f"{path}, record {number}").unrelated_questions if has_questions(record) else []
        concept, name = str(record.get("Concept", number - 1)), record.get("id", number - 1)
        found += [
            {"question": text, "group": concept, "id": f"{name}-unrelated-{index}"} for index, text in enumerate(texts)
        ]
    return found


def _completion_records(records: Sequence[Record], path: Path) -> list[Record]:
    """Texts in two halves, of ConceptVectors records or one a record; none where the records are others."""
    found = []
    for number, record in enumerate(records, start=1):
        texts = ConceptRecord(record, f"{path}, record {number}").halves
        group, name = str(record.get("Concept", record.get("group", ""))), record.get("id", number - 1)
        for index, (first, second) in enumerate(texts):
            found.append({"prompt": first, "answer": second, "group": group, "id": f"{name}-text-{index}"})
    return found


def _encode(
    records: Sequence[Record], source: str, tokenizer: PreTrainedTokenizerBase, reading: Reading, model: "Model"
) -> Prompts:
    """Prompts of records that are no file of their own; ConceptVectors' wrapping unless another is asked for."""
    from unlearning.evaluation.generation import greedy_answers

    template = None if reading.chat else reading.template or NOTEBOOK_TEMPLATE
    chat = chat_format(tokenizer) if reading.chat else None
    raw = list(questions(list(records), source, template, chat, verbatim_rows=False))[: reading.limit]
    answers = [question.answer for question in raw]
    unanswered = [index for index, answer in enumerate(answers) if answer is None]
    written = greedy_answers(
        model.hf,
        tokenizer,
        [raw[index].prompt for index in unanswered],
        max_new_tokens=_ANSWER_TOKENS,
        add_special_tokens=not reading.chat,
    )
    for index, text in zip(unanswered, written, strict=True):
        answers[index] = cut_continuation(text)
        if not answers[index]:
            raise InputError(
                f"{source}, prompt {raw[index].id}: {model.name} answers nothing to {raw[index].prompt[-60:]!r}"
            )
    items = []
    for question, answer in zip(raw, answers, strict=True):
        try:
            span = encode_answer(tokenizer, question.prompt, answer or "", chat=chat)
        except InputError as error:
            raise InputError(f"{source}, prompt {question.id}: {error}") from None
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=question.prompt,
                answer=answer or "",
                input_ids=tuple(span.input_ids),
                answer_start=span.answer_start,
                scored=range(span.answer_start - 1, len(span.input_ids) - 1),
            )
        )
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return Prompts(items=tuple(items), scoring="answer", pad_token_id=int(pad), source=source)
