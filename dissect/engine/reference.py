"""One hooked forward pass per intervention: slow, obvious, the oracle of every test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.engine import Advance, Sweep, targets_of
from dissect.engine.chunk import Chunk
from dissect.engine.layers import Layers
from dissect.interventions.donors import Donor
from dissect.interventions.intervention import Intervention, weights_among
from dissect.models.model import Model
from dissect.models.parameter_swap import restored_values, with_values
from dissect.models.sites import SITES
from dissect.models.weights import Chosen, Place, WeightNames
from dissect.prompts.prompts import Batch

Hook = Callable[..., Tensor | None]


def sweep(
    layers: Layers,
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    donor: Donor,
    _chunk: Chunk,
    advance: Advance,
) -> Iterator[list[Sweep]]:
    """Run the base and the donor once, each target once, and each target once per intervention."""
    base, targets = layers.models[0], targets_of(layers.models, donor)
    points = sorted({point for intervention in interventions for point in hook_points(intervention)})
    share = 1 / (len(batches) * len(targets) * len(interventions))
    for batch in batches:
        batch = batch.to(base.device)
        activations = donated(donor, batch, points)

        def intervened(target: Model, batch: Batch = batch, given: dict[str, Tensor] = activations) -> Iterator[Tensor]:
            for intervention in interventions:
                yield run_intervention(donor.model, target, batch, intervention, given)
                advance(share)

        base_logits = scored_logits(base, batch, [])
        yield [Sweep(base_logits, scored_logits(target, batch, []), intervened(target)) for target in targets]


def donated(donor: Donor, batch: Batch, points: Sequence[str]) -> dict[str, Tensor]:
    """What a donor gives at these hook points."""
    _, activations = record(donor.model, donor.batch(batch), points)
    of = {site.hook_name(layer): (name, layer) for name, site in SITES.items() for layer in range(donor.model.n_layers)}
    return {
        point: donor.given(states, batch, site=of[point][0], layer=of[point][1])
        for point, states in activations.items()
    }


def run_intervention(
    donor: Model, target: Model, batch: Batch, intervention: Intervention, activations: dict[str, Tensor]
) -> Float[Tensor, "scored vocab"]:
    """The target's logits under one intervention, given a donor's activations."""

    def replaced(_activation: Tensor, hook: Any) -> Tensor:
        return activations[hook.name]

    chosen = chosen_weights(target.weights, intervention)
    if chosen:
        # A view of its own: the bridge copies fused projections when it is made.
        target = replace(target, hf=with_values(target.hf, restored_values(target.hf, donor.hf, chosen)))
    return scored_logits(target, batch, [(point, replaced) for point in hook_points(intervention)])


def chosen_weights(weights: WeightNames, intervention: Intervention) -> Chosen:
    """The parameters that an intervention restores."""
    places: list[tuple[frozenset[str], Place]] = [(intervention.before, "before"), (intervention.after, "after")]
    places += [(weights_among(intervention.sites), layer) for layer in intervention.window.layers]
    return {name: rows for sites, place in places for name, rows in weights.at(sites, place).items()}


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
