"""Perturbations of the residual stream, as an adversary chooses them who may change hidden states but no weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.data.batches import TokenBatch
from unlearning.objectives.forward import answer_nll, blocks, unwrapped


@contextmanager
def perturbed(model: PreTrainedModel, layer: int, added: Float[Tensor, "batch position d_model"]) -> Iterator[None]:
    """Add to a block's output in every forward pass.

    Args:
        model: A Hugging Face model, wrapped or not.
        layer: Index of the block, from 0.
        added: What is added; cast to the output's data type.

    Yields:
        Nothing.
    """

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + added.to(output.dtype)
        return type(output)((output[0] + added.to(output[0].dtype), *output[1:]))

    handle = blocks(model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def prompt_tokens(batch: TokenBatch) -> Bool[Tensor, "batch position"]:
    """Return which tokens belong to a prompt; all tokens of a text without one."""
    present = batch.attention_mask.bool()
    first = batch.predicts_answer.int().argmax(dim=1)  # the last token of the prompt makes the first prediction
    position = torch.arange(present.shape[1], device=present.device)
    return present & ((position <= first[:, None]) | (first[:, None] == 0))


def eliciting(
    model: PreTrainedModel, batch: TokenBatch, layer: int, *, radius: float, steps: int
) -> Float[Tensor, "batch position d_model"]:
    """Search what to add to a block's output at the prompts' tokens so that the answers become most probable.

    Projected gradient descent on the answers' cross-entropy from 0: at every token a step of 2 radius / steps along the
    gradient's direction, then back into the ball. Texts do not influence each other.

    Args:
        model: A Hugging Face model, wrapped or not; its weights get no gradient.
        batch: Prompts and answers.
        layer: Index of the block, from 0.
        radius: Largest norm at a token.
        steps: Number of steps; each costs a forward and a backward pass.

    Returns:
        What to add, float32, 0 outside the prompts.
    """
    inner = unwrapped(model)  # a data-parallel wrapper would expect a backward pass through the weights
    d_model = int(inner.config.get_text_config().hidden_size)
    here = prompt_tokens(batch)
    counted = here[..., None].float()
    added = torch.zeros(*here.shape, d_model, device=here.device)
    for _ in range(steps):
        added.requires_grad_(True)
        with torch.enable_grad(), perturbed(inner, layer, added):
            loss = answer_nll(inner, batch).sum()
        (slope,) = torch.autograd.grad(loss, added)
        with torch.no_grad():
            along = slope * counted
            length = along.norm(dim=-1, keepdim=True)
            moved = added - 2 * radius / steps * along / length.clamp(min=torch.finfo(length.dtype).tiny)
            size = moved.norm(dim=-1, keepdim=True)
            added = moved * (radius / size.clamp(min=radius))
    return added.detach()
