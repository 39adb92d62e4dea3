"""Single MLP neurons: whose coefficients changed most, what they write, and which others to compare them with.

A neuron is a layer and an index into the MLP's hidden width. Its value vector v is what one unit of its coefficient
adds to the residual stream: a column of the down projection. Neurons are ranked by

    score = mean |m_u - m_b| * |v_b|

the mean over examples of each example's mean over its answer positions, with the base's value vector: by how much
the neuron's own contribution to the residual stream changed. Raw mean |m_u - m_b| is reported beside it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dissect.coefficients.changes import paired_coefficients
from dissect.coefficients.hooks import check_coefficients, down_projections
from dissect.models.anatomy import component_path
from dissect.models.model import Model
from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError

NEAREST = 5
"""From so many neurons of nearest scale each norm-matched partner is drawn."""


@dataclass(frozen=True, eq=False)
class NeuronChanges:
    """Every neuron's coefficient in two models, as means over examples of means over their answer positions.

    Attributes:
        base: mean coefficient in the base.
        other: mean coefficient in the other model.
        base_size: mean absolute coefficient in the base.
        change: mean absolute change.
        value_norm: norm of the base's value vector.
    """

    base: Float[Tensor, "layer d_mlp"]
    other: Float[Tensor, "layer d_mlp"]
    base_size: Float[Tensor, "layer d_mlp"]
    change: Float[Tensor, "layer d_mlp"]
    value_norm: Float[Tensor, "layer d_mlp"]

    @property
    def score(self) -> Float[Tensor, "layer d_mlp"]:
        """What neurons are ranked by."""
        return self.change * self.value_norm

    @property
    def scale(self) -> Float[Tensor, "layer d_mlp"]:
        """How much a neuron writes in the base: mean absolute coefficient times the value vector's norm."""
        return self.base_size * self.value_norm

    def ranking(self) -> Int[np.ndarray, " neuron"]:
        """All neurons from the most changed to the least, as flat indices; of equals the earlier one first."""
        return np.argsort(-self.score.flatten().numpy(), kind="stable")


def neuron_changes(base: Model, other: Model, prompts: Prompts, *, batch_size: int = 16) -> NeuronChanges:
    """Every neuron's coefficients in both models at the answer positions.

    Raises:
        InputError: a mixture of experts, a streamed model, a batch size below 1.
    """
    totals: Tensor | None = None
    for batch, ours, theirs in paired_coefficients(base, other, prompts, batch_size=batch_size):
        lengths = torch.tensor([prompts.items[example].n_answer_tokens for example in batch.examples])
        weights = (1 / (lengths[batch.rows] * len(prompts))).double().to(ours.device)
        # Layer by layer, since all of them would be twice as large in float64.
        part = torch.stack([_weighted(weights, *layer) for layer in zip(ours, theirs, strict=True)], 1).cpu()
        totals = part if totals is None else totals + part
    assert totals is not None, "prompts are never empty"
    of_base, of_other, base_size, change = totals
    norms = torch.stack([value_vectors(base, layer).double().norm(dim=-1).cpu() for layer in range(base.n_layers)])
    return NeuronChanges(of_base, of_other, base_size, change, norms)


def _weighted(
    weights: Float[Tensor, " scored"], ours: Float[Tensor, "scored d_mlp"], theirs: Float[Tensor, "scored d_mlp"]
) -> Float[Tensor, "four d_mlp"]:
    ours, theirs = ours.double(), theirs.double()
    return torch.stack([weights @ values for values in (ours, theirs, ours.abs(), (theirs - ours).abs())])


@torch.inference_mode()
def value_vectors(model: Model, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The value vectors of a layer, one a row, in float32 or wider.

    Raises:
        InputError: a mixture of experts or a streamed model.
    """
    check_coefficients(model)
    module: Any = down_projections(model)[layer]
    weight = module.weight.detach() if isinstance(module, Conv1D) else module.weight.detach().T
    return weight if weight.dtype == torch.float64 else weight.float()


@torch.inference_mode()
def vocabulary_scores(model: Model, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """What vectors in the residual stream say in the vocabulary: through the final norm's weight and the unembedding.

    The norm is given the vector itself and its bias is taken off again, so that a vector's tokens are in the order
    that it would add to the logits by itself, whatever kind of norm the model has; the size of the scores is that of
    a vector of the norm's own length. A norm that some families put after the MLP (OLMo-2, Gemma-2) is left out.

    Raises:
        InputError: between the model's last block and its head is more than a norm.
    """
    head: Any = model.hf.get_output_embeddings()
    path = component_path(model.adapter.component_mapping, "ln_final")
    norm = None if path is None else model.hf.get_submodule(path)
    vectors = vectors.to(head.weight)
    if norm is not None:
        vectors = norm(vectors) - norm(torch.zeros_like(vectors[:1]))
    if vectors.shape[-1] != head.weight.shape[-1]:
        raise InputError(
            f"{model.name}: its head reads {head.weight.shape[-1]} numbers and its value vectors have "
            f"{vectors.shape[-1]}; neurons of such a model cannot be read in the vocabulary"
        )
    return (vectors @ head.weight.T).float()


def top_tokens(model: Model, layer: int, neuron: int, *, count: int) -> tuple[list[str], list[str]]:
    """The tokens that a neuron's value vector promotes most and demotes most, as text."""
    scores = vocabulary_scores(model, value_vectors(model, layer)[neuron][None])[0]
    count = min(count, len(scores))
    promoted, demoted = scores.topk(count).indices, (-scores).topk(count).indices
    return tuple([str(model.tokenizer.decode([token])) for token in found.tolist()] for found in (promoted, demoted))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons whose coefficients are put back together.

    Attributes:
        selection: `top` (most changed), `random` (any), or `matched` (as large, in the same layers).
        k: how many.
        draw: which of several seeds chose them; 0 for `top`.
        chosen: where they are.
    """

    selection: str
    k: int
    draw: int
    chosen: Bool[Tensor, "layer d_mlp"]

    @property
    def layers(self) -> list[int]:
        """Layers with a chosen neuron."""
        return [int(layer) for layer in self.chosen.any(1).nonzero()[:, 0]]


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def neuron_sets(changes: NeuronChanges, *, draws: int, seed: int) -> list[NeuronSet]:
    """The most changed k neurons for k = 1, 2, 4, ..., all, and as many for comparison.

    `random` are any k of all neurons; those of one draw are the first k of one random order. `matched` are k others
    than the top k: each in the layer of one of them and drawn from the neurons there whose `NeuronChanges.scale` is
    nearest and that are not taken, so that the two sets write about as much. Where a layer has not that many others,
    that k has no matched set; and all neurons are the same in every selection.
    """
    ranking, shape = changes.ranking(), changes.change.shape
    orders = [np.random.default_rng([seed, draw]).permutation(len(ranking)) for draw in range(draws)]
    sets = []
    for k in powers_of_two(len(ranking)):
        sets.append(NeuronSet("top", k, 0, _mask(ranking[:k], shape)))
        if k == len(ranking):
            break
        for draw, order in enumerate(orders):
            sets.append(NeuronSet("random", k, draw, _mask(order[:k], shape)))
            generator = np.random.default_rng([seed, draw, k])
            found = matched_neurons(ranking[:k], changes.scale.numpy(), generator)
            if found is not None:
                sets.append(NeuronSet("matched", k, draw, _mask(found, shape)))
    return sets


def matched_neurons(
    chosen: Int[np.ndarray, " neuron"], scale: Float[np.ndarray, "layer d_mlp"], generator: np.random.Generator
) -> Int[np.ndarray, " neuron"] | None:
    """For each chosen neuron another one of its layer and about its scale, none twice; None where there are too few."""
    width = scale.shape[1]
    found: list[int] = []
    for layer in np.unique(chosen // width):
        here = chosen[chosen // width == layer] % width
        rest = np.setdiff1d(np.arange(width), here)
        if len(rest) < len(here):
            return None
        rest = rest[np.argsort(scale[layer, rest], kind="stable")]
        free, scales = rest.tolist(), scale[layer, rest].tolist()
        for neuron in generator.permutation(here):
            wanted = scale[layer, neuron]
            place = bisect_left(scales, wanted)
            near = range(max(0, place - NEAREST), min(len(free), place + NEAREST))
            nearest = sorted(near, key=lambda at: abs(scales[at] - wanted))[:NEAREST]
            pick = nearest[int(generator.integers(len(nearest)))]
            found.append(int(layer) * width + free.pop(pick))
            scales.pop(pick)
    return np.array(found)


def _mask(flat: Int[np.ndarray, " neuron"], shape: torch.Size) -> Bool[Tensor, "layer d_mlp"]:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[torch.from_numpy(flat.copy())] = True
    return mask.view(shape)
