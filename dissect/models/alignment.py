"""Test whether two models have their neurons, heads and channels in one order, and put them back into it.

A merge, an export or a permuting optimiser may give a model whose neurons stand in another order than the base's. It
computes the same, but neuron 7 of the one is not neuron 7 of the other: patched coefficients and restored weights are
then noise. Units are recognised by their weights. In fine-tuned models almost every unit is most similar to the unit at
its own place; in a reordered one, to a unit at another place, and much more so.
"""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.models.canonical import matching, similarity
from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import Permutation, permute
from dissect.models.model import Model
from dissect.models.symmetries import find_symmetries, random_tokens
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError

SAMPLE = 64
"""Units of a layer that are looked at."""

OWN_PLACE = 0.9
"""Mean similarity of units at the same place above which no other places are searched."""

GAIN = 0.2
"""A unit counts as moved if its most similar counterpart at another place is more similar by this much."""

MOST = 0.5
"""A layer counts as reordered if this share of its units were moved."""

_NAMES = {
    "stream order": "channels of the residual stream",
    "heads": "attention heads",
    "query heads": "query heads",
    "experts": "experts",
    "neurons": "MLP neurons",
}


@dataclass(frozen=True)
class Reordered:
    """Units of one kind that stand in another order.

    Attributes:
        kind: `stream order`, `heads`, `query heads`, `experts` or `neurons`.
        layers: Layers with such units; empty for the channels of the residual stream.
    """

    kind: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        """Return the kind and the number of layers in words."""
        if not self.layers:
            return _NAMES[self.kind]
        return f"{_NAMES[self.kind]} of {len(self.layers)} layer{'s' * (len(self.layers) > 1)}"


def find_reordered(base: Model, other: Model) -> list[Reordered]:
    """Find units of a model that stand in another order than the base's.

    Args:
        base: The base; its weights are in memory.
        other: A model of the same architecture; its weights are in memory.

    Returns:
        Kinds of units with their layers; empty if the orders agree, or if no order makes the models alike. Where a kind
        was found, units that lie inside of it are not looked at.
    """
    if base.hf is other.hf:
        return []
    key = base.sha256, other.sha256
    if key not in _known:
        _known[key] = _find_reordered(base, other)
    return list(_known[key])


_known: dict[tuple[str, str], list[Reordered]] = {}
"""What was found, by the content hashes of both models: several commands of a session ask about the same pair."""


def _find_reordered(base: Model, other: Model) -> list[Reordered]:
    found: dict[str, list[int]] = {}
    outer: set[int] = set()  # layers with reordered units that hold smaller ones
    for permutation in Structure(base, base.hf, random_tokens(base)).permutations():
        inner = permutation.part is not None
        if inner and permutation.layer in outer:
            continue
        if _is_reordered(base, other, permutation):
            if permutation.layer is None:
                return [Reordered(permutation.kind, ())]
            layers = found.setdefault(permutation.kind, [])
            if permutation.layer not in layers:
                layers.append(permutation.layer)
            if not inner:
                outer.add(permutation.layer)
    return [Reordered(kind, tuple(layers)) for kind, layers in found.items()]


def check_order(base: Model, other: Model) -> None:
    """Check that a model has its units in the base's order.

    Args:
        base: The base.
        other: A model whose activations or weights are compared with the base's, place by place. Models that are
            streamed from disk are not checked.

    Raises:
        InputError: Units stand in another order.
    """
    if base.streamed is not None or other.streamed is not None:
        return
    found = find_reordered(base, other)
    if found:
        raise InputError(
            f"the {' and '.join(map(str, found))} of {other.name} stand in another order than those of {base.name}, so "
            "that activations and weights cannot be compared place by place. Set `align` to put them back into the "
            "base's order, which changes no output"
        )


def aligned(base: Model, other: Model) -> Model:
    """Put a model's channels, heads, experts and neurons into the order of the base's.

    Args:
        base: The base; its weights are in memory.
        other: A model of the same architecture; its weights are in memory, and it is not changed.

    Returns:
        A copy with the same outputs, or the model itself if the orders agree already.

    Raises:
        InputError: A model is streamed from disk.

    Examples:
        >>> from dissect import load_model
        >>> from dissect.models.rewriting import rewritten
        >>> base = load_model("demo:base", device="cpu")
        >>> moved = rewritten(base, seed=0, kinds=["neurons"])
        >>> [str(one) for one in find_reordered(base, moved)]
        ['MLP neurons of 8 layers']
        >>> find_reordered(base, aligned(base, moved))
        []
    """
    for model in (base, other):
        if model.streamed is not None:
            raise InputError(f"`align` needs the weights of {model.name} in memory; turn `stream` off")
    if not find_reordered(base, other):
        return other
    hf = copy.deepcopy(other.hf)
    for permutation in find_symmetries(other).permutations:
        permute(hf, permutation, matching(hf, base.hf, permutation))
    return replace(other, hf=hf, sha256=content_hash(hf, name=other.name))


def _is_reordered(base: Model, other: Model, permutation: Permutation) -> bool:
    n_units = permutation.n_units
    sample = torch.linspace(0, n_units - 1, min(SAMPLE, n_units)).long()
    own = _similarities(base, other, permutation, sample, sample).diagonal()
    if not len(own) or float(own.mean()) >= OWN_PLACE:
        return False
    similar = _similarities(base, other, permutation, sample, torch.arange(n_units))
    best = similar.max(1).values
    return float((best > own + GAIN).double().mean()) >= MOST


def _similarities(
    base: Model, other: Model, permutation: Permutation, ours: Int[Tensor, " n"], theirs: Int[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """Return the mean similarity of some units of the base with some of the other model, over their matrices."""
    matrices = [
        slots for slots in permutation.slots if slots.identifies and base.hf.get_parameter(slots.parameter).dim() > 1
    ]
    if not matrices:
        return torch.zeros(0, 0, dtype=torch.float64)
    found = []
    for slots in matrices:
        of_base, of_other = replace(slots, rows=slots.rows[ours]), replace(slots, rows=slots.rows[theirs])
        found.append(similarity(of_base.units(base.hf), of_other.units(other.hf)))
    return torch.stack(found).mean(0)
