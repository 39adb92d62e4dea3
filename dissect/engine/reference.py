"""One hooked forward pass per intervention: slow, obvious, the oracle of every test."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.engine import Sweep
from dissect.interventions import Intervention
from dissect.pairs import Model
from dissect.prompts import Batch
from dissect.sites import SITES

Hook = Callable[..., Tensor | None]


def sweep(base: Model, target: Model, batch: Batch, interventions: Sequence[Intervention]) -> Sweep:
    """Run the base once, the target once, and the target once per intervention."""
    batch = batch.to(base.device)
    points = sorted({point for intervention in interventions for point in hook_points(intervention)})
    base_logits, activations = record(base, batch, points)
    target_logits = scored_logits(target, batch, [])
    return Sweep(base_logits, target_logits, _intervened(target, batch, interventions, activations))


def _intervened(
    target: Model, batch: Batch, interventions: Sequence[Intervention], activations: dict[str, Tensor]
) -> Iterator[Float[Tensor, "scored vocab"]]:
    def replace(_activation: Tensor, hook: Any) -> Tensor:
        return activations[hook.name]

    for intervention in interventions:
        yield scored_logits(target, batch, [(point, replace) for point in hook_points(intervention)])


def hook_points(intervention: Intervention) -> list[str]:
    """The hook points that an intervention replaces."""
    return [SITES[site].hook_name(layer) for layer in intervention.window.layers for site in intervention.sites]


def record(
    model: Model, batch: Batch, points: Sequence[str]
) -> tuple[Float[Tensor, "scored vocab"], dict[str, Tensor]]:
    """Run a model and keep its activations at these hook points, at every token position."""
    activations: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        activations[hook.name] = activation.clone()

    return scored_logits(model, batch, [(point, keep) for point in points]), activations


@torch.inference_mode()
def scored_logits(model: Model, batch: Batch, hooks: Sequence[tuple[str, Hook]]) -> Float[Tensor, "scored vocab"]:
    """The logits at the batch's scored positions with these hooks in place, in float32 or wider."""
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        # None is passed on too: left out, the bridge derives positions from the mask, which no notebook did.
        inputs["position_ids"] = batch.position_ids
    logits = model.bridge.run_with_hooks(batch.input_ids, fwd_hooks=list(hooks), return_type="logits", **inputs)
    scored = logits[batch.rows, batch.columns]
    return scored if scored.dtype == torch.float64 else scored.float()
