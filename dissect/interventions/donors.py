"""Define the sources of patched activations: a model on the same or another question, or noise of equal norm."""

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
"""Donors that are not models; their activations carry no information about the answer."""


@dataclass(frozen=True, eq=False)
class Donor:
    """Source of activations.

    Attributes:
        model: Model that computes the activations.
        tokens: For each example, the tokens of equal number that the model reads instead; empty if it reads the
            examples themselves.
        noise: For noise with the norms of the activations: the seed, and each example's number of tokens. None for the
            activations themselves.
    """

    model: Model
    tokens: Mapping[int, tuple[int, ...]]
    noise: tuple[int, Mapping[int, int]] | None = None

    def batch(self, batch: Batch) -> Batch:
        """Return what the donor reads when a target reads a batch: the same shape and the same padding."""
        if not self.tokens:
            return batch
        input_ids = batch.input_ids.clone()
        for row, example in enumerate(batch.examples):
            columns = batch.attention_mask[row].nonzero()[:, 0]
            input_ids[row, columns] = torch.tensor(self.tokens[example][: len(columns)], device=input_ids.device)
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
        """Return what replaces a target's activations: the donor's activations, or noise with their norms.

        Args:
            states: The donor's activations.
            batch: Batch that the activations belong to.
            site: Site of the activations. Noise is drawn separately for every site, layer and example, so it does not
                depend on how prompts are batched.
            layer: Layer of the activations.
            positions: Flat positions of the batch, if `states` has only these, as [1, kept, width]; None for all.

        Returns:
            Activations of the same shape; padding is not replaced by noise.
        """
        if self.noise is None:
            return states
        seed, lengths = self.noise
        directions = torch.zeros(*batch.input_ids.shape, states.shape[-1], dtype=states.dtype)
        for row, example in enumerate(batch.examples):
            name = f"{seed} {site} {layer} {example}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(lengths[example], states.shape[-1], generator=generator)
            columns = batch.attention_mask[row].nonzero()[:, 0].cpu()
            directions[row, columns] = (drawn / drawn.norm(dim=-1, keepdim=True))[: len(columns)].to(states.dtype)
        directions = directions.to(states.device)
        is_token = batch.attention_mask.bool().to(states.device)
        if positions is not None:
            kept = positions.to(states.device)
            directions, is_token = directions.flatten(0, 1)[kept][None], is_token.flatten()[kept][None]
        norms = states.norm(dim=-1, keepdim=True)
        return torch.where(is_token[..., None], directions * norms, states)


def own_activations(model: Model) -> Donor:
    """Return a donor that gives a model's activations on the same question."""
    return Donor(model, {})


def other_question(model: Model, prompts: Prompts, *, seed: int) -> Donor:
    """Return a donor that gives a model's activations on another question with another answer.

    The other prompt is truncated or repeated on the left to the length of the example's prompt, and its answer is
    truncated or repeated to the length of the example's answer, so that both answers start at the same position. A
    common first token, such as BOS, is kept.

    Args:
        model: Model that computes the activations.
        prompts: Prompts of the sweep, from which the other questions are drawn.
        seed: Seed of the assignment.

    Returns:
        The donor, with one other question for each example.

    Raises:
        InputError: No other prompt has another answer.
    """
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    tokens = {}
    for position, index in enumerate(order):
        item = prompts.items[index]
        others = (prompts.items[order[(position + step) % len(order)]] for step in range(1, len(order)))
        fitted = (fit_tokens(one, item) for one in others)
        # Answers are compared after truncation, because truncation can make different answers equal.
        other = next((one for one in fitted if one[item.answer_start :] != _answer(item)), None)
        if other is None:
            raise InputError(
                f"`donor` must not be 'other-question' here: no other prompt has another answer than {item.id}; "
                "give more prompts"
            )
        tokens[index] = other
    return Donor(model, tokens)


def _answer(item: Prompt) -> tuple[int, ...]:
    return item.input_ids[item.answer_start :]


def fit_tokens(other: Prompt, item: Prompt) -> tuple[int, ...]:
    """Return the tokens of another prompt and answer, fitted to the lengths of an example; see `other_question`.

    Args:
        other: Prompt whose tokens are used.
        item: Example that sets the lengths of prompt and answer.

    Returns:
        As many tokens as the example has.
    """
    first = item.input_ids[:1] if item.input_ids[0] == other.input_ids[0] else ()
    n_prompt, n_answer = item.answer_start - len(first), len(item.input_ids) - item.answer_start
    prompt, answer = other.input_ids[len(first) : other.answer_start], _answer(other)
    filled = prompt * (n_prompt // max(1, len(prompt)) + 1) or answer * n_prompt
    return (*first, *filled[len(filled) - n_prompt :], *(answer * n_answer)[:n_answer])


def norm_matched_noise(model: Model, prompts: Prompts, *, seed: int) -> Donor:
    """Return a donor that gives random directions with the norms of a model's activations.

    Args:
        model: Model whose activation at the same site, layer and position sets the norm.
        prompts: Prompts of the sweep.
        seed: Seed of the directions.

    Returns:
        The donor.
    """
    return Donor(model, {}, (seed, {index: len(item.input_ids) for index, item in enumerate(prompts.items)}))
