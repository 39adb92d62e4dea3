"""Prompts with answers: from files, from the paper's JSON, or answered by the base model; and their batches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dissect.prompts.records import NOTEBOOK_TEMPLATE, Question, cut_continuation, questions
from unlearning.common.errors import InputError
from unlearning.data.chat import chat_format
from unlearning.data.records import read_records
from unlearning.data.spans import encode_answer

if TYPE_CHECKING:
    from dissect.models.model import Model

Scoring = Literal["answer", "notebook"]


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt and answer.

    Attributes:
        id: its name in result tables.
        group: what belongs together (a person, an author, a concept), or "" where there are no groups.
        prompt: the text before the answer.
        answer: the answer's text.
        input_ids: the tokens of both.
        answer_start: index of the answer's first token.
        scored: positions whose logits are scored. With `answer` scoring these are the answer positions, which
            predict the answer's tokens; with `notebook` scoring the last n positions of the row.
        wrong: wrong answers that the file gives, each with the tokens of the prompt and itself.
    """

    id: str
    group: str
    prompt: str
    answer: str
    input_ids: tuple[int, ...]
    answer_start: int
    scored: range
    wrong: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def n_answer_tokens(self) -> int:
        """How many positions are scored."""
        return len(self.scored)


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded prompts and where in them logits are scored.

    Attributes:
        examples: the prompts' indices in `Prompts.items`.
        input_ids: token ids, padded.
        attention_mask: 1 on tokens, 0 on padding.
        position_ids: positions that padding does not shift, or None to let the model count columns, padding
            included, as the released notebooks do.
        rows: row of each scored position; positions of one example are neighbours, examples are in order.
        columns: column of each scored position.
        next_tokens: the token that follows each scored position, -1 where none does.
    """

    examples: tuple[int, ...]
    input_ids: Int[Tensor, "batch position"]
    attention_mask: Int[Tensor, "batch position"]
    position_ids: Int[Tensor, "batch position"] | None
    rows: Int[Tensor, " scored"]
    columns: Int[Tensor, " scored"]
    next_tokens: Int[Tensor, " scored"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            examples=self.examples,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            next_tokens=self.next_tokens.to(device),
        )

    @property
    def is_dense(self) -> bool:
        """Whether so much of it is tokens that leaving the padding out would cost more than it saves."""
        return float(self.attention_mask.float().mean()) > 0.9

    def trimmed(self) -> "Batch":
        """The batch without the columns after its last scored one, which nothing that is scored can see."""
        end = int(self.columns.max()) + 1
        return replace(
            self,
            input_ids=self.input_ids[:, :end],
            attention_mask=self.attention_mask[:, :end],
            position_ids=None if self.position_ids is None else self.position_ids[:, :end],
        )

    def pieces(self, n_rows: int) -> "list[Batch]":
        """The batch cut into batches of so many rows at most, padded as it is."""
        if n_rows >= len(self.examples):
            return [self]
        cut = []
        for first in range(0, len(self.examples), n_rows):
            rows = slice(first, first + n_rows)
            scored = (self.rows >= first) & (self.rows < first + n_rows)
            cut.append(
                Batch(
                    examples=self.examples[rows],
                    input_ids=self.input_ids[rows],
                    attention_mask=self.attention_mask[rows],
                    position_ids=None if self.position_ids is None else self.position_ids[rows],
                    rows=self.rows[scored] - first,
                    columns=self.columns[scored],
                    next_tokens=self.next_tokens[scored],
                )
            )
        return cut


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts that are scored together.

    Attributes:
        items: the prompts, in the order of their file.
        scoring: which protocol they are scored by.
        pad_token_id: what fills the batches.
        source: where they came from.
    """

    items: tuple[Prompt, ...]
    scoring: Scoring
    pad_token_id: int
    source: str

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_groups(self) -> bool:
        """Whether there are at least two groups, so that intervals can be taken over groups."""
        return len({item.group for item in self.items} - {""}) > 1

    @property
    def sha256(self) -> str:
        """Content hash of what is computed on: tokens, scored positions, groups."""
        rows = [[p.id, p.group, p.input_ids, p.answer_start, p.scored.start, p.scored.stop] for p in self.items]
        return hashlib.sha256(json.dumps([self.scoring, self.pad_token_id, rows]).encode()).hexdigest()

    def batches(self, batch_size: int, *, padding_side: Literal["left", "right"] = "right") -> list[Batch]:
        """Cut the prompts into batches.

        With `notebook` scoring a batch is a whole group, padded left, whatever the arguments: padding shifts
        the positions there, so another batch would give other numbers.
        """
        if self.scoring == "notebook":
            groups: dict[str, list[int]] = {}
            for index, item in enumerate(self.items):
                groups.setdefault(item.group, []).append(index)
            return [self._batch(indices, "left", explicit_positions=False) for indices in groups.values()]
        indices = list(range(len(self.items)))
        return [
            self._batch(indices[start : start + batch_size], padding_side, explicit_positions=True)
            for start in range(0, len(indices), batch_size)
        ]

    def _batch(
        self, indices: Sequence[int], padding_side: Literal["left", "right"], *, explicit_positions: bool
    ) -> Batch:
        items = [self.items[index] for index in indices]
        width = max(len(item.input_ids) for item in items)
        input_ids = torch.full((len(items), width), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        rows, columns, next_tokens = [], [], []
        for row, item in enumerate(items):
            length = len(item.input_ids)
            offset = width - length if padding_side == "left" else 0
            input_ids[row, offset : offset + length] = torch.tensor(item.input_ids)
            mask[row, offset : offset + length] = 1
            for position in item.scored:
                rows.append(row)
                columns.append(offset + position)
                next_tokens.append(item.input_ids[position + 1] if position + 1 < length else -1)
        return Batch(
            examples=tuple(indices),
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0) if explicit_positions else None,
            rows=torch.tensor(rows),
            columns=torch.tensor(columns),
            next_tokens=torch.tensor(next_tokens),
        )


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: Scoring = "answer",
    template: str | None = None,
    chat: bool = False,
    answers: Literal["given", "base"] = "given",
    answers_from: "Model | None" = None,
    max_new_tokens: int = 30,
    limit: int | None = None,
) -> Prompts:
    r"""Read prompts and answers, tokenise them and find the answer positions.

    Args:
        path: a JSON list or JSON lines of `{"prompt", "answer"}` or `{"question", "answer"}` records (both with
            optional `group`, `id` and `wrong` answers, TOFU's `perturbed_answer`), or ConceptVectors' JSON with the
            paper's prompts.
        tokenizer: the pair's.
        scoring: `answer`, every answer token by the position that predicts it; or `notebook`, the released
            notebooks' protocol with its flaws, for replication.
        template: wrapping of a question, with `{question}`; by default `Question: {question}\nAnswer:`.
        chat: wrap questions by the tokenizer's chat template instead.
        answers: `base` replaces the answers by the base model's greedy continuations.
        answers_from: the model that answers where there is no answer.
        max_new_tokens: length of those continuations, in tokens.
        limit: read this many prompts only.

    Raises:
        InputError: an unreadable file (which line), a record without the fields, an empty answer, a template
            without `{question}`, no chat template, or missing answers and no model to give them.
    """
    if template is not None and "{question}" not in template:
        raise InputError(f"--template {template!r} has no {{question}} in it")
    if chat and template is not None:
        raise InputError("--chat and --template both wrap the question; give one of them")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least one prompt is needed")
    if scoring == "notebook":
        if chat or template is not None:
            raise InputError("--scoring notebook has its own prompt; leave --chat and --template out")
        raw = list(questions(read_records(path), path, NOTEBOOK_TEMPLATE, None, verbatim_rows=answers == "given"))
        return _notebook_prompts(raw[:limit], tokenizer, str(path), answers_from, max_new_tokens)
    wrap = chat_format(tokenizer) if chat else None
    raw = list(questions(read_records(path), path, template, wrap, verbatim_rows=False))[:limit]
    texts = _answered(raw, tokenizer, answers, answers_from, max_new_tokens, chat=chat)
    items = []
    for question, answer in zip(raw, texts, strict=True):
        try:
            span = encode_answer(tokenizer, question.prompt, answer, chat=wrap)
        except InputError as error:
            raise InputError(f"{path}, prompt {question.id}: {error}") from None
        if span.answer_start == 0:
            raise InputError(f"{path}, prompt {question.id}: the prompt is empty, so nothing predicts the answer")
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=question.prompt,
                answer=answer,
                input_ids=tuple(span.input_ids),
                answer_start=span.answer_start,
                scored=range(span.answer_start - 1, len(span.input_ids) - 1),
                wrong=tuple(
                    (text, tuple(encode_answer(tokenizer, question.prompt, text, chat=wrap).input_ids))
                    for text in question.wrong
                ),
            )
        )
    return Prompts(items=tuple(items), scoring="answer", pad_token_id=_pad_token(tokenizer), source=str(path))


def _answered(
    raw: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    answers: Literal["given", "base"],
    model: "Model | None",
    max_new_tokens: int,
    *,
    chat: bool,
) -> list[str]:
    open_questions = [i for i, question in enumerate(raw) if answers == "base" or question.answer is None]
    texts = [question.answer or "" for question in raw]
    if not open_questions:
        return texts
    if model is None:
        raise InputError(
            f"prompt {raw[open_questions[0]].id} has no answer; give answers, or pass answers_from=pair.base"
        )
    _check_in_memory(model)
    from unlearning.evaluation.generation import greedy_answers

    prompts = [raw[i].prompt for i in open_questions]
    continuations = greedy_answers(
        model.hf, tokenizer, prompts, max_new_tokens=max_new_tokens, add_special_tokens=not chat
    )
    for i, continuation in zip(open_questions, continuations, strict=True):
        texts[i] = cut_continuation(continuation)
        if not texts[i]:
            raise InputError(f"prompt {raw[i].id}: {model.name} answers nothing to {raw[i].prompt[-60:]!r}")
    return texts


def _notebook_prompts(
    raw: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    model: "Model | None",
    max_new_tokens: int,
) -> Prompts:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("--scoring notebook pads with the end-of-sequence token, and the tokenizer has none")
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(raw):
        groups.setdefault(question.group, []).append(index)
    rows = {i: question.row for i, question in enumerate(raw)}
    lengths = {i: question.n_answer_tokens for i, question in enumerate(raw)}
    for indices in groups.values():
        if all(rows[i] is not None and lengths[i] is not None for i in indices):
            continue
        if model is None:
            raise InputError(f"{source}: no QA_with_answers to replicate; pass answers_from=pair.base")
        prompts = [raw[i].prompt for i in indices]
        for i, (text, n_tokens) in zip(
            indices, _notebook_continuations(model, tokenizer, prompts, max_new_tokens), strict=True
        ):
            rows[i] = text
            lengths[i] = n_tokens
    items = []
    for index, question in enumerate(raw):
        row, n = rows[index], lengths[index]
        assert row is not None and n is not None
        ids = tokenizer(row)["input_ids"]
        if not 1 <= n <= len(ids):
            raise InputError(
                f"{source}, prompt {question.id}: by the notebooks' rule its answer has {n} of the row's {len(ids)} "
                "tokens (answers_tokens_num); remove the question or use --scoring answer"
            )
        start = len(ids) - n
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=str(tokenizer.decode(ids[:start])),
                answer=str(tokenizer.decode(ids[start:])),
                input_ids=tuple(ids),
                answer_start=start,
                scored=range(start, len(ids)),
            )
        )
    return Prompts(items=tuple(items), scoring="notebook", pad_token_id=eos, source=source)


def _notebook_continuations(
    model: "Model", tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, int]]:
    """Rows and answer lengths as the released notebooks make them, from one left-padded batch.

    Their length rule counts end-of-sequence tokens over the whole row and pads with the same token, so that it
    takes every left pad off the answer: n = row length - count(row == eos) - input length.
    """
    _check_in_memory(model)
    eos = tokenizer.eos_token_id
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    with torch.inference_mode():
        generate: Any = model.hf.generate
        output = generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [(text, output.shape[1] - int((row == eos).sum()) - width) for text, row in zip(texts, output, strict=True)]


def _check_in_memory(model: "Model") -> None:
    if model.streamed is not None:
        raise InputError(
            f"{model.name} is streamed from disk and cannot write answers token by token; give prompts with answers, "
            "or load it whole (--no-stream)"
        )


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any id will do: padded positions are masked out and never scored.
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def check_fits(model: "Model", prompts: Prompts, name: str = "") -> None:
    """Check that a model can read prompts.

    Args:
        model: the model.
        prompts: what it is to read.
        name: of this set of prompts, where there are several.

    Raises:
        InputError: a prompt is longer than the model's context, or has a token that the model does not have.
    """
    vocabulary = model.hf.config.get_text_config().vocab_size
    for item in prompts.items:
        prompt = " ".join(filter(None, (name, "prompt", item.id)))
        if len(item.input_ids) > model.context:
            raise InputError(
                f"{prompt} has {len(item.input_ids)} tokens with its answer, and the context of {model.name} "
                f"is {model.context}; shorten or remove it"
            )
        if max(item.input_ids) >= vocabulary:
            raise InputError(
                f"{prompt} has the token {max(item.input_ids)}, and {model.name} has {vocabulary} of them; "
                "the tokenizer is not this model's: copy its own beside the base's weights"
            )
