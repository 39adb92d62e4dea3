"""Logits at the scored positions of a batch."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Batch


@torch.inference_mode()
def answer_logits(model: Model, batch: Batch) -> Float[Tensor, "scored vocab"]:
    """Logits at the batch's scored positions, in float32 or wider."""
    batch = batch.to(model.device)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    first = 0
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        # Answers stand at the end of their rows: nothing before the first of them goes through the head.
        first = int(batch.columns.min())
        inputs["logits_to_keep"] = batch.input_ids.shape[1] - first
    logits = model.hf(**inputs, use_cache=False).logits
    scored = logits[batch.rows, batch.columns - first]
    return scored if scored.dtype == torch.float64 else scored.float()
