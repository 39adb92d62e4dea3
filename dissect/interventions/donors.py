"""Where patched activations come from: a model on the same question, on another one, or noise of the same norm."""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompt, Prompts
from unlearning.common.errors import InputError

KINDS = ("other-question", "noise")
"""Donors that are no model: what a patch does that carries nothing of the answer."""


@dataclass(frozen=True, eq=False)
class Donor:
    """Where activations come from.

    Attributes:
        model: what they are computed by.
        tokens: what it reads in place of each example, of the same length; empty where it reads the example.
        noise: for norm-matched noise in place of its activations, the seed and each example's number of tokens.
    """

    model: Model
    tokens: Mapping[int, tuple[int, ...]]
    noise: tuple[int, Mapping[int, int]] | None = None

    def batch(self, batch: Batch) -> Batch:
        """What the donor reads where a target reads this batch: the same shape, padded alike."""
        if not self.tokens:
            return batch
        input_ids = batch.input_ids.clone()
        for row, example in enumerate(batch.examples):
            here = batch.attention_mask[row].nonzero()[:, 0]
            input_ids[row, here] = torch.tensor(self.tokens[example][: len(here)], device=input_ids.device)
        return replace(batch, input_ids=input_ids)

    def replacement(
        self,
        states: Float[Tensor, "batch position width"],
        batch: Batch,
        *,
        site: str,
        layer: int,
        positions: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "batch position width"]:
        """What is given in place of the donor's activations: themselves, or noise with their norm at every position.

        Args:
            states: the donor's activations.
            batch: the batch that they come from.
            site: where; noise is drawn anew for every site, layer and example, however batches are cut.
            layer: where.
            positions: flat positions of the batch that the states are kept at, as [1, kept, width]; None for all.
        """
        if self.noise is None:
            return states
        seed, lengths = self.noise
        directions = torch.zeros(*batch.input_ids.shape, states.shape[-1], dtype=states.dtype)
        for row, example in enumerate(batch.examples):
            name = f"{seed} {site} {layer} {example}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(lengths[example], states.shape[-1], generator=generator)
            here = batch.attention_mask[row].nonzero()[:, 0].cpu()
            directions[row, here] = (drawn / drawn.norm(dim=-1, keepdim=True))[: len(here)].to(states.dtype)
        directions = directions.to(states.device)
        is_token = batch.attention_mask.bool().to(states.device)
        if positions is not None:
            kept = positions.to(states.device)
            directions, is_token = directions.flatten(0, 1)[kept][None], is_token.flatten()[kept][None]
        norms = states.norm(dim=-1, keepdim=True)
        return torch.where(is_token[..., None], directions * norms, states)


def own_activations(model: Model) -> Donor:
    """A model's activations on the question that is asked."""
    return Donor(model, {})


def other_question(model: Model, prompts: Prompts, *, seed: int) -> Donor:
    """A model's activations on another question, whose answer starts where this one's does.

    The other prompt is cut on the left, or repeated to the left, to the length of this one, and its answer is cut or
    repeated to the length of this answer; a token that both begin with, as BOS, stays.

    Raises:
        InputError: there is no prompt with another answer.
    """
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    tokens = {}
    for place, index in enumerate(order):
        item = prompts.items[index]
        after = (prompts.items[order[(place + step) % len(order)]] for step in range(1, len(order)))
        fitted = (fit_tokens(one, item) for one in after)
        # Compared as they are read: an answer that begins as this one does may be cut down to it.
        other = next((one for one in fitted if one[item.answer_start :] != _answer(item)), None)
        if other is None:
            raise InputError(
                f"--donor other-question: no other prompt has another answer than {item.id}; give more prompts"
            )
        tokens[index] = other
    return Donor(model, tokens)


def _answer(item: Prompt) -> tuple[int, ...]:
    return item.input_ids[item.answer_start :]


def fit_tokens(other: Prompt, item: Prompt) -> tuple[int, ...]:
    """The tokens of another prompt and answer, fitted into the place of this one's; see `other_question`."""
    first = item.input_ids[:1] if item.input_ids[0] == other.input_ids[0] else ()
    n_prompt, n_answer = item.answer_start - len(first), len(item.input_ids) - item.answer_start
    prompt, answer = other.input_ids[len(first) : other.answer_start], _answer(other)
    filled = prompt * (n_prompt // max(1, len(prompt)) + 1) or answer * n_prompt
    return (*first, *filled[len(filled) - n_prompt :], *(answer * n_answer)[:n_answer])


def norm_matched_noise(model: Model, prompts: Prompts, *, seed: int) -> Donor:
    """Random directions with the norm that a model's activation has at the same site, layer and position."""
    return Donor(model, {}, (seed, {index: len(item.input_ids) for index, item in enumerate(prompts.items)}))
