"""Tokenised prompts with answers, their batches, and what a model needs to read them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from unlearning.common.context import why_no_longer
from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat

if TYPE_CHECKING:
    from dissect.models.model import Model

Scoring = Literal["answer", "notebook"]


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt and answer.

    Attributes:
        id: Identifier in result tables.
        group: The person, author or concept that the prompt asks about, or "" where there are no groups.
        prompt: Text before the answer.
        answer: Text of the answer.
        input_ids: Tokens of the prompt and the answer.
        answer_start: Index of the answer's first token.
        scored: Positions whose logits are scored. With `answer` scoring these are the answer positions, which
            predict the answer's tokens; with `notebook` scoring the last n positions of the row.
        wrong: The distractors that the file gives, each with the tokens of the prompt and the distractor.
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
        """Number of scored positions."""
        return len(self.scored)


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded prompts and their scored positions.

    Attributes:
        examples: Indices of the prompts in `Prompts.items`.
        input_ids: Token ids, padded.
        attention_mask: 1 on tokens, 0 on padding.
        position_ids: Positions that padding does not shift, or None to let the model count columns, padding
            included, as the released notebooks do.
        rows: Row of each scored position; positions of one example are adjacent, examples are in order.
        columns: Column of each scored position.
        next_tokens: Token that follows each scored position, -1 where none follows.
    """

    examples: tuple[int, ...]
    input_ids: Int[Tensor, "batch position"]
    attention_mask: Int[Tensor, "batch position"]
    position_ids: Int[Tensor, "batch position"] | None
    rows: Int[Tensor, " scored"]
    columns: Int[Tensor, " scored"]
    next_tokens: Int[Tensor, " scored"]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
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
        """True if there is so little padding that removing it would cost more than it saves."""
        return float(self.attention_mask.float().mean()) > 0.9

    def trimmed(self) -> "Batch":
        """Return the batch without the columns after the last scored one; no scored position attends to them."""
        end = int(self.columns.max()) + 1
        return replace(
            self,
            input_ids=self.input_ids[:, :end],
            attention_mask=self.attention_mask[:, :end],
            position_ids=None if self.position_ids is None else self.position_ids[:, :end],
        )

    def pieces(self, n_rows: int) -> "list[Batch]":
        """Return the batch cut into batches of at most `n_rows` rows, with the same padding."""
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
    """A set of prompts that is scored by one protocol.

    Attributes:
        items: The prompts, in the order of their file.
        scoring: The protocol that they are scored by, `answer` or `notebook`.
        pad_token_id: The token that pads batches.
        source: The file that they came from, and who answered them if not the file.
        chat: Chat template that they were wrapped in; None for none. It brings its own special tokens.
    """

    items: tuple[Prompt, ...]
    scoring: Scoring
    pad_token_id: int
    source: str
    chat: ChatFormat | None = None

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.items)

    @property
    def sha256(self) -> str:
        """Content hash of everything that is computed with: tokens, scored positions, groups."""
        rows = [[p.id, p.group, p.input_ids, p.answer_start, p.scored.start, p.scored.stop] for p in self.items]
        return hashlib.sha256(json.dumps([self.scoring, self.pad_token_id, rows]).encode()).hexdigest()

    def batches(self, batch_size: int, *, padding_side: Literal["left", "right"] = "right") -> list[Batch]:
        """Cut the prompts into batches.

        With `notebook` scoring a batch is a whole group, padded on the left, whatever the arguments: padding shifts
        the positions there, so that another batch would give other numbers.

        Args:
            batch_size: Largest number of prompts in a batch.
            padding_side: Side on which shorter prompts are padded.

        Returns:
            The batches, in the order of the prompts.
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


def check_loaded(prompts: object, name: str) -> None:
    """Check that an argument holds loaded prompts, and not the file that holds them.

    Args:
        prompts: Value of the argument.
        name: Name of the argument.

    Raises:
        InputError: The value is something else.
    """
    if not isinstance(prompts, Prompts):
        raise InputError(
            f"`{name}` must be loaded prompts, got {type(prompts).__name__} {prompts!r}. "
            "Load them with load_prompts(file, pair.tokenizer)"
        )


def check_fits(model: "Model", prompts: Prompts, name: str = "") -> None:
    """Check that a model can read prompts.

    Args:
        model: The model.
        prompts: The prompts.
        name: Name of the set of prompts in messages, where there are several.

    Raises:
        InputError: A prompt is longer than the model's context, or has a token that the model does not have.
    """
    vocabulary = model.hf.config.get_text_config().vocab_size
    for item in prompts.items:
        prompt = " ".join(filter(None, (name, "prompt", item.id)))
        if len(item.input_ids) > model.context:
            raise InputError(
                f"{prompt} has {len(item.input_ids)} tokens with its answer, and the context of {model.name} "
                f"is {model.context} tokens{why_no_longer(model.hf)}; shorten or remove the prompt"
            )
        if max(item.input_ids) >= vocabulary:
            raise InputError(
                f"{prompt} has the token id {max(item.input_ids)}, and the vocabulary of {model.name} has {vocabulary} "
                "tokens; the tokenizer belongs to another model: put this model's own next to the base's weights"
            )


def check_in_memory(model: "Model", purpose: str) -> None:
    """Check that a model is in memory as a whole.

    Args:
        model: The model.
        purpose: What needs the whole model, such as "generating text"; the message names it.

    Raises:
        InputError: The model is streamed from disk.
    """
    if model.streamed is not None:
        raise InputError(
            f"{model.name} is streamed from disk, and {purpose} needs the whole model in memory; turn `stream` off"
        )
