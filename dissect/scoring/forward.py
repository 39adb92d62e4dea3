"""Logits at the scored positions of a batch."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.models.model import Model
from dissect.prompts.prompts import Batch


@torch.inference_mode()
def scored_logits(model: Model, batch: Batch, *, only_scored: bool = False) -> Float[Tensor, "scored vocab"]:
    """Run a model and return its logits at the scored positions of a batch, in float32 or wider.

    Hooks that are registered on the model take effect.

    Args:
        model: The model, in memory.
        batch: The batch, on any device.
        only_scored: Run the output head on the scored positions alone, instead of on all positions from the first
            scored one on. Computes less; the two differ by rounding.

    Returns:
        One row for each scored position, in the order of `batch.rows`.
    """
    batch = batch.to(model.device)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    if only_scored:
        with _head_at_scored(model, batch):
            return _wide(model.hf(**inputs, use_cache=False).logits[0])
    first = 0
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        # Answers stand at the end of their rows: no position before the first of them goes through the head.
        first = int(batch.columns.min())
        inputs["logits_to_keep"] = batch.input_ids.shape[1] - first
    logits = model.hf(**inputs, use_cache=False).logits
    return _wide(logits[batch.rows, batch.columns - first])


@contextmanager
def _head_at_scored(model: Model, batch: Batch) -> Iterator[None]:
    """Give the output head only the scored positions, as one row."""
    head: Any = model.hf.get_output_embeddings()

    def at_scored(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        states = args[0]
        # Layers may lie on several devices.
        return (states[batch.rows.to(states.device), batch.columns.to(states.device)][None],)

    handle = head.register_forward_pre_hook(at_scored)
    try:
        yield
    finally:
        handle.remove()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
