"""Restore the base's MLP coefficients in a target model and score the recovery: single neurons, or whole layers.

Both interventions apply at every token position of a teacher-forced prompt and are scored at its answer positions:

    neurons    m <- m_b for the chosen neurons; the target computes all others
    scaling    m <- m_t + a (m_b - m_t) in the chosen layers, where m_t and m_b are the coefficients of the target and
               the base without intervention: a = 0 changes nothing, a = 1 is the `mlp_coef` patch, a = 2 overshoots
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dissect.coefficients.hooks import coefficients_everywhere, edited_logits
from dissect.coefficients.neurons import NeuronSet
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.rows import RecoveryScorer, as_rows, example_columns

FACTORS = tuple(step / 4 for step in range(9))
"""Scaling factors a: 0, 0.25, ..., 2."""

Row = dict[str, Any]
"""A row of the results table."""

Advance = Callable[[float], None]
"""Function that moves a progress bar on by a number of interventions."""


def restore_neurons(
    base: Model,
    targets: Mapping[str, Model],
    prompts: Prompts,
    batch: Batch,
    sets: Sequence[NeuronSet],
    advance: Advance,
) -> Iterator[Row]:
    """Restore every set of neurons in every target, for one batch.

    Args:
        base: Base model.
        targets: Models by name (`unlearned`, `control`).
        prompts: Prompts of the batch.
        batch: The batch.
        sets: Sets of neurons.
        advance: Moves the progress bar on.

    Yields:
        One row per target, set and example.
    """
    layers = range(base.n_layers)
    examples = example_columns(prompts, batch)
    base_logits, given = coefficients_everywhere(base, batch, layers)
    for name, target in targets.items():
        scorer = RecoveryScorer(base_logits, edited_logits(target, batch), batch, name=target.name, extra="kl_own")
        for neurons in sets:
            chosen = neurons.chosen.to(base.device)

            def restore(layer: int, own: Tensor, chosen: Tensor = chosen) -> Tensor:
                return torch.where(chosen[layer].to(own.device), given[layer].to(own), own)

            logits = edited_logits(target, batch, restore, neurons.layers)
            what = {"selection": neurons.selection, "k": neurons.k, "draw": neurons.draw, "factor": 1.0}
            recovery = scorer.columns(logits, f"{neurons.k} {neurons.selection} neurons restored")
            for row in as_rows(examples | recovery):
                yield {"target": name, "intervention": "neurons", **what, **row}
            advance(len(batch.examples))


def scale_layers(
    base: Model,
    targets: Mapping[str, Model],
    prompts: Prompts,
    batch: Batch,
    layers: Sequence[int],
    factors: Sequence[float],
    advance: Advance,
) -> Iterator[Row]:
    """Scale the coefficients of some layers towards the base's, in every target, for one batch.

    Args:
        base: Base model.
        targets: Models by name (`unlearned`, `control`).
        prompts: Prompts of the batch.
        batch: The batch.
        layers: Layers whose coefficients are scaled together.
        factors: Scaling factors a.
        advance: Moves the progress bar on.

    Yields:
        One row per target, factor and example.
    """
    examples = example_columns(prompts, batch)
    base_logits, given = coefficients_everywhere(base, batch, layers)
    what = {"selection": f"layers {layers[0]}-{layers[-1]}", "k": sum(given[layer].shape[-1] for layer in layers)}
    for name, target in targets.items():
        before, own = coefficients_everywhere(target, batch, layers)
        scorer = RecoveryScorer(base_logits, before, batch, name=target.name, extra="kl_own")
        for factor in factors:

            def scaled(layer: int, now: Tensor, factor: float = factor, own: dict[int, Tensor] = own) -> Tensor:
                # lerp is exact for the factors 0 and 1, and for every factor where both coefficients are equal.
                return torch.lerp(own[layer], given[layer].to(own[layer]), factor).to(now)

            # With factor 0, no layer changes.
            logits = before if factor == 0 else edited_logits(target, batch, scaled, layers)
            recovery = scorer.columns(logits, f"{what['selection']} scaled by {factor}")
            for row in as_rows(examples | recovery):
                yield {"target": name, "intervention": "scaling", **what, "draw": 0, "factor": factor, **row}
            advance(len(batch.examples))
