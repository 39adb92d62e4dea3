"""Run one hooked forward pass per intervention: slow and simple, the reference that the tests compare with.

The model that runs is the Hugging Face model itself, with plain torch hooks. Hook points have TransformerLens' names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.engine import Advance, Sweep, targets_of
from dissect.engine.chunk import Chunk
from dissect.engine.layers import Layers
from dissect.engine.proof import prove_weights_only
from dissect.interventions.donors import Donor
from dissect.interventions.intervention import Intervention, weights_among
from dissect.models.hooks import Act, hooked
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.parameter_swap import restored_values
from dissect.models.sites import SITES, Site
from dissect.models.weights import Location, ParameterRows, WeightNames
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
    """Run the base and the donor once, each target once, and each target once per intervention.

    Args:
        layers: Models of the sweep: the base, then the donor's model if it is another one, then the targets.
        batches: Padded prompts.
        interventions: Interventions on each target.
        donor: Source of activations and weights.
        _chunk: Not used; every batch goes through a model as a whole.
        advance: Called after each intervention.

    Yields:
        For each batch, one sweep of each target.
    """
    base, targets = layers.models[0], targets_of(layers.models, donor)
    prove_weights_only(donor.model, targets, batches[0])
    points = sorted({point for intervention in interventions for point in hook_points(intervention)})
    share = 1 / (len(batches) * len(targets) * len(interventions))
    for batch in batches:
        batch = batch.to(base.device)
        activations = donor_activations(donor, batch, points)

        def intervened(target: Model, batch: Batch = batch, given: dict[str, Tensor] = activations) -> Iterator[Tensor]:
            for intervention in interventions:
                yield run_intervention(donor.model, target, batch, intervention, given)
                advance(share)

        base_logits = scored_logits(base, batch, [])
        yield [Sweep(base_logits, scored_logits(target, batch, []), intervened(target)) for target in targets]


def donor_activations(donor: Donor, batch: Batch, points: Sequence[str]) -> dict[str, Tensor]:
    """Compute what a donor gives at hook points.

    Args:
        donor: Source of the activations.
        batch: Batch that the targets read.
        points: Names of hook points.

    Returns:
        For each hook point, activations of shape [batch, position, width].
    """
    _, activations = record(donor.model, donor.batch(batch), points)
    of = {site.hook_name(layer): (name, layer) for name, site in SITES.items() for layer in range(donor.model.n_layers)}
    return {
        point: donor.replacement(states, batch, site=of[point][0], layer=of[point][1])
        for point, states in activations.items()
    }


def run_intervention(
    donor: Model, target: Model, batch: Batch, intervention: Intervention, activations: dict[str, Tensor]
) -> Float[Tensor, "scored vocab"]:
    """Compute the target's logits under one intervention.

    Args:
        donor: Source of the weights.
        target: Model that is intervened on.
        batch: Batch that the target reads.
        intervention: Sites and layers that are replaced.
        activations: For each hook point, the activations that replace the target's.

    Returns:
        The logits at the scored positions, in float32 or wider.
    """

    def replaced(_activation: Tensor, hook: Any) -> Tensor:
        return activations[hook.name].clone()  # a block may write into what its modules return

    chosen = chosen_weights(target.weights, intervention)
    if chosen:
        target = replace(target, hf=with_values(target.hf, restored_values(target.hf, donor.hf, chosen)))
    return scored_logits(target, batch, [(point, replaced) for point in hook_points(intervention)])


def chosen_weights(weights: WeightNames, intervention: Intervention) -> ParameterRows:
    """Return the parameters that an intervention restores.

    Args:
        weights: Parameters of the target, by site.
        intervention: Sites and layers that are restored.

    Returns:
        Names of parameters, each with its output rows, or None for all rows.
    """
    restored: list[tuple[frozenset[str], Location]] = [(intervention.before, "before"), (intervention.after, "after")]
    restored += [(weights_among(intervention.sites), layer) for layer in intervention.window.layers]
    return {name: rows for sites, location in restored for name, rows in weights.at(sites, location).items()}


def hook_points(intervention: Intervention) -> list[str]:
    """Return the hook points that an intervention replaces."""
    sites = [SITES[site] for site in intervention.sites if site in SITES]
    return [site.hook_name(layer) for layer in intervention.window.layers for site in sites]


def record(
    model: Model, batch: Batch, points: Sequence[str]
) -> tuple[Float[Tensor, "scored vocab"], dict[str, Tensor]]:
    """Run a model and keep its activations at hook points.

    Args:
        model: Model to run.
        batch: Batch to read.
        points: Names of hook points.

    Returns:
        The logits at the scored positions, and the activations at each hook point and every token position.
    """
    activations: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        activations[hook.name] = activation.clone()

    return scored_logits(model, batch, [(point, keep) for point in points]), activations


@torch.inference_mode()
def scored_logits(model: Model, batch: Batch, hooks: Sequence[tuple[str, Hook]]) -> Float[Tensor, "scored vocab"]:
    """Compute the logits at a batch's scored positions, with hooks in place.

    Args:
        model: Model to run.
        batch: Batch to read.
        hooks: Names of hook points, each with its hook: a function of the activation and the hook point, whose `name`
            it may read. It returns what replaces the activation, or None.

    Returns:
        The logits, in float32 or wider.
    """
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    with hooked(model.hf, model.anatomy, _places(model, hooks), shape=tuple(batch.input_ids.shape)):
        logits = model.hf(input_ids=batch.input_ids, use_cache=False, **inputs).logits
    scored = logits[batch.rows, batch.columns]
    return scored if scored.dtype == torch.float64 else scored.float()


@dataclass(frozen=True)
class HookPoint:
    """Place of an activation, by TransformerLens' name."""

    name: str


def _places(model: Model, hooks: Sequence[tuple[str, Hook]]) -> list[tuple[Site, int, Act]]:
    """Return the site and layer of every hook point, with a function of the activation alone."""
    known = {site.hook_name(layer): (site, layer) for site in SITES.values() for layer in range(model.n_layers)}
    return [(*known[name], partial(hook, hook=HookPoint(name))) for name, hook in hooks]
