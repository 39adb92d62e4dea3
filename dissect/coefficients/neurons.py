"""Rank MLP neurons by the change of their coefficients, read their value vectors, and choose neurons to compare with.

A neuron is a layer and an index in the MLP's hidden width. Its value vector v, a column of the down projection, is
what a coefficient of 1 adds to the residual stream. Neurons are ranked by

    score = mean |m_u - m_b| * |v_b|

where v_b is the base's value vector and the mean is over examples, of each example's mean over its answer positions.
The score measures how much the neuron's contribution to the residual stream changed. The mean |m_u - m_b| alone is
reported as well.
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
from dissect.models.model import Model
from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError

NEAREST = 5
"""Number of neurons of nearest scale from which each norm-matched neuron is drawn."""


@dataclass(frozen=True, eq=False)
class NeuronChanges:
    """Coefficients of all neurons in two models: means over examples of each example's mean over its answer positions.

    Attributes:
        base: Mean coefficient in the base.
        other: Mean coefficient in the other model.
        base_size: Mean absolute coefficient in the base.
        change: Mean absolute change of the coefficient.
        value_norm: Norm of the base's value vector.
    """

    base: Float[Tensor, "layer d_mlp"]
    other: Float[Tensor, "layer d_mlp"]
    base_size: Float[Tensor, "layer d_mlp"]
    change: Float[Tensor, "layer d_mlp"]
    value_norm: Float[Tensor, "layer d_mlp"]

    @property
    def score(self) -> Float[Tensor, "layer d_mlp"]:
        """Score by which neurons are ranked."""
        return self.change * self.value_norm

    @property
    def scale(self) -> Float[Tensor, "layer d_mlp"]:
        """Size of a neuron's contribution in the base: mean absolute coefficient times norm of the value vector."""
        return self.base_size * self.value_norm

    def ranking(self) -> Int[np.ndarray, " neuron"]:
        """Return the flat indices of all neurons, the most changed first; of equal scores, the lower index first."""
        return np.argsort(-self.score.flatten().numpy(), kind="stable")


def neuron_changes(base: Model, other: Model, prompts: Prompts, *, batch_size: int = 16) -> NeuronChanges:
    """Measure the coefficients of all neurons in both models at the answer positions.

    Args:
        base: Base model.
        other: Model of the same shape.
        prompts: Prompts that both models read.
        batch_size: Largest number of prompts per batch; does not change any number.

    Returns:
        Means in float64, on the CPU.

    Raises:
        InputError: A model is a mixture of experts or streamed, or the batch size is below 1.
    """
    totals: Tensor | None = None
    for batch, ours, theirs in paired_coefficients(base, other, prompts, batch_size=batch_size):
        lengths = torch.tensor([prompts.items[example].n_answer_tokens for example in batch.examples])
        weights = (1 / (lengths[batch.rows] * len(prompts))).double().to(ours.device)
        # Layer by layer, since float64 copies of all layers would double the memory.
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
    """Return the value vectors of a layer, one per row.

    Args:
        model: The model.
        layer: Index of the layer.

    Returns:
        Value vectors in float32 (float64 for a float64 model).

    Raises:
        InputError: The model is a mixture of experts or streamed.
    """
    check_coefficients(model)
    module: Any = down_projections(model)[layer]
    weight = module.weight.detach() if isinstance(module, Conv1D) else module.weight.detach().T
    return weight if weight.dtype == torch.float64 else weight.float()


@torch.inference_mode()
def vocabulary_scores(model: Model, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """Project vectors of the residual stream onto the vocabulary, through the final norm and the unembedding.

    With the norm N without its bias and the unembedding E, the scores are E N(v). They order tokens by what the vector
    alone adds to the logits; their size is that of a vector of the norm's own length. The norm that some families apply
    to the output of the MLP (OLMo-2, Gemma-2) is not applied.

    Args:
        model: The model.
        vectors: Vectors of the residual stream.

    Returns:
        Scores in float32.

    Raises:
        InputError: The model has more than a norm between its last block and its head.
    """
    head: Any = model.hf.get_output_embeddings()
    norm = model.final_norm
    vectors = vectors.to(head.weight)
    if norm is not None:
        vectors = norm(vectors) - norm(torch.zeros_like(vectors[:1]))
    if vectors.shape[-1] != head.weight.shape[-1]:
        raise InputError(
            f"the output head of {model.name} reads {head.weight.shape[-1]} numbers, but its value vectors have "
            f"{vectors.shape[-1]}: they cannot be projected onto the vocabulary"
        )
    return (vectors @ head.weight.T).float()


def top_tokens(model: Model, layer: int, neuron: int, *, count: int) -> tuple[list[str], list[str]]:
    """Return the tokens that a neuron's value vector promotes most and demotes most.

    Args:
        model: The model.
        layer: Layer of the neuron.
        neuron: Index of the neuron in the layer.
        count: Number of tokens.

    Returns:
        Texts of the promoted tokens and of the demoted tokens, the strongest first.
    """
    scores = vocabulary_scores(model, value_vectors(model, layer)[neuron][None])[0]
    count = min(count, len(scores))
    promoted, demoted = scores.topk(count).indices, (-scores).topk(count).indices
    return tuple([str(model.tokenizer.decode([token])) for token in found.tolist()] for found in (promoted, demoted))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons whose coefficients are restored together.

    Attributes:
        selection: `top` (most changed), `random`, or `matched` (similar scale, in the same layers).
        k: Number of neurons.
        draw: Index of the random draw; 0 for `top`.
        chosen: Mask of the neurons.
    """

    selection: str
    k: int
    draw: int
    chosen: Bool[Tensor, "layer d_mlp"]

    @property
    def layers(self) -> list[int]:
        """Layers that have a chosen neuron."""
        return [int(layer) for layer in self.chosen.any(1).nonzero()[:, 0]]


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4, ... below n, and n."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def neuron_sets(changes: NeuronChanges, *, draws: int, seed: int) -> list[NeuronSet]:
    """Choose the k most changed neurons for k = 1, 2, 4, ..., all, and as many others for comparison.

    A `random` set has the first k neurons of a random order, the same order for every k of a draw. A `matched` set has
    k neurons outside the top k, one for each: in the same layer, drawn from the free neurons of nearest
    `NeuronChanges.scale`, so that both sets contribute about as much to the residual stream.

    Args:
        changes: Changes of all neurons.
        draws: Number of random and of matched sets per k.
        seed: Random seed.

    Returns:
        The sets. A k has no matched set if a layer has too few other neurons; all neurons are only in a `top` set.
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
    """Draw for each chosen neuron another one of the same layer and similar scale, without repeats.

    Args:
        chosen: Flat indices of the chosen neurons.
        scale: Scale of every neuron.
        generator: Source of randomness.

    Returns:
        Flat indices, or None if a layer has too few other neurons.
    """
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
            index = bisect_left(scales, wanted)
            near = range(max(0, index - NEAREST), min(len(free), index + NEAREST))
            nearest = sorted(near, key=lambda at: abs(scales[at] - wanted))[:NEAREST]
            pick = nearest[int(generator.integers(len(nearest)))]
            found.append(int(layer) * width + free.pop(pick))
            scales.pop(pick)
    return np.array(found)


def _mask(flat: Int[np.ndarray, " neuron"], shape: torch.Size) -> Bool[Tensor, "layer d_mlp"]:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[torch.from_numpy(flat.copy())] = True
    return mask.view(shape)
