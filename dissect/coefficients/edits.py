"""What comes back when the base's MLP coefficients are put into a target: of chosen neurons, or of layers by degrees.

Both at every token position of the same teacher-forced prompt, scored at the answer positions as every patch is:

    neurons    m <- m_b for the chosen neurons, whatever the target computes elsewhere
    scaling    m <- m_t + a (m_b - m_t) in the chosen layers, with m_t and m_b the coefficients of the target's and the
               base's own undisturbed runs: a = 0 changes nothing, a = 1 is the `mlp_coef` patch, a = 2 overshoots
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
"""0, 0.25, ..., 2."""

Row = dict[str, Any]
Advance = Callable[[float], None]


def restore_neurons(
    base: Model,
    targets: Mapping[str, Model],
    prompts: Prompts,
    batch: Batch,
    sets: Sequence[NeuronSet],
    advance: Advance,
) -> Iterator[Row]:
    """Rows of one batch: every set of neurons put back into every target."""
    layers = range(base.n_layers)
    examples = example_columns(prompts, batch)
    base_logits, given = coefficients_everywhere(base, batch, layers)
    for name, target in targets.items():
        scorer = RecoveryScorer(base_logits, edited_logits(target, batch), batch, name=target.name, extra="kl_own")
        for neurons in sets:
            chosen = neurons.chosen.to(base.device)

            def put_back(layer: int, own: Tensor, chosen: Tensor = chosen) -> Tensor:
                return torch.where(chosen[layer].to(own.device), given[layer].to(own), own)

            logits = edited_logits(target, batch, put_back, neurons.layers)
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
    """Rows of one batch: these layers' coefficients moved towards the base's by every factor, in every target."""
    examples = example_columns(prompts, batch)
    base_logits, given = coefficients_everywhere(base, batch, layers)
    what = {"selection": f"layers {layers[0]}-{layers[-1]}", "k": sum(given[layer].shape[-1] for layer in layers)}
    for name, target in targets.items():
        before, own = coefficients_everywhere(target, batch, layers)
        scorer = RecoveryScorer(base_logits, before, batch, name=target.name, extra="kl_own")
        for factor in factors:

            def scaled(layer: int, now: Tensor, factor: float = factor, own: dict[int, Tensor] = own) -> Tensor:
                # Exact at both ends, and for every factor where the two are the same.
                return torch.lerp(own[layer], given[layer].to(own[layer]), factor).to(now)

            # The first of the layers computes what it did before; with factor 0 so do all.
            logits = before if factor == 0 else edited_logits(target, batch, scaled, layers)
            recovery = scorer.columns(logits, f"{what['selection']} scaled by {factor}")
            for row in as_rows(examples | recovery):
                yield {"target": name, "intervention": "scaling", **what, "draw": 0, "factor": factor, **row}
            advance(len(batch.examples))
