"""One hooked forward pass per intervention: slow, obvious, the oracle of every test."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.anatomy import block_of
from dissect.engine import Advance, Sweep
from dissect.engine.chunk import Chunk
from dissect.engine.layers import Layers
from dissect.interventions import Intervention
from dissect.pairs import Model
from dissect.prompts import Batch
from dissect.sites import SITES, WEIGHT_SITES

Hook = Callable[..., Tensor | None]


def sweep(
    layers: Layers, batches: Sequence[Batch], interventions: Sequence[Intervention], _chunk: Chunk, advance: Advance
) -> Iterator[list[Sweep]]:
    """Run the base once, each target once, and each target once per intervention."""
    base, *targets = layers.models
    points = sorted({point for intervention in interventions for point in hook_points(intervention)})
    share = 1 / (len(batches) * len(targets) * len(interventions))
    for batch in batches:
        batch = batch.to(base.device)
        base_logits, activations = record(base, batch, points)

        def intervened(target: Model, batch: Batch = batch, donor: dict[str, Tensor] = activations) -> Iterator[Tensor]:
            for intervention in interventions:
                yield run_intervention(base, target, batch, intervention, donor)
                advance(share)

        yield [Sweep(base_logits, scored_logits(target, batch, []), intervened(target)) for target in targets]


def run_intervention(
    base: Model, target: Model, batch: Batch, intervention: Intervention, activations: dict[str, Tensor]
) -> Float[Tensor, "scored vocab"]:
    """The target's logits under one intervention, given the base's activations."""

    def replace(_activation: Tensor, hook: Any) -> Tensor:
        return activations[hook.name]

    with ExitStack() as stack:
        for layer in intervention.window.layers:
            for site in intervention.sites:
                if site in WEIGHT_SITES:
                    part = WEIGHT_SITES[site].part
                    ours, theirs = (getattr(block_of(m.hf, m.anatomy, layer), part) for m in (target, base))
                    stack.enter_context(restored_weights(ours, theirs))
        return scored_logits(target, batch, [(point, replace) for point in hook_points(intervention)])


@contextmanager
def restored_weights(ours: nn.Module, theirs: nn.Module) -> Iterator[None]:
    """Let a module compute with another's weights, by pointer; its own are put back whatever happens.

    The bridge's tree shares the parameters themselves, so it sees the change.
    """
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    own = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, other in pairs:
            parameter.data = other.data
        yield
    finally:
        for (parameter, _), data in zip(pairs, own, strict=True):
            parameter.data = data


def hook_points(intervention: Intervention) -> list[str]:
    """The hook points that an intervention replaces."""
    sites = [SITES[site] for site in intervention.sites if site in SITES]
    return [site.hook_name(layer) for layer in intervention.window.layers for site in sites]


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
