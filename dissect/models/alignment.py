"""Test whether two models are written in one basis, and put the second one back into the first one's.

A merge, an export or a permuting optimiser may give a model whose neurons stand in another order than the base's, or
whose signs and scales were moved between matrices. It computes the same, but neuron 7 of the one is not neuron 7 of the
other: patched coefficients and restored weights are then noise. Units are recognised by their weights: in fine-tuned
models a unit is most similar to the unit at its own place, with the same sign, and training does not scale the two
sides of a freedom in opposite directions. Only what `find_symmetries` proves to change no output counts, and is undone.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dissect.models.canonical import fold, matching
from dissect.models.comparison import Freedom, differs, gains_differ, undoing_factors
from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import Permutation, Scaling, permute, scale
from dissect.models.freedoms.norms import share_epsilon
from dissect.models.model import Model
from dissect.models.streamed_basis import differing_on_disk
from dissect.models.symmetries import find_symmetries, random_tokens
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {
    "stream order": "channels of the residual stream",
    "stream signs": "channels of the residual stream",
    "stream": "residual stream",
    "norm": "norms' gains",
    "normalised": "matrices before norms",
    "heads": "attention heads",
    "query heads": "query heads",
    "experts": "experts",
    "neurons": "MLP neurons",
    "mlp": "MLP neurons",
    "value": "value channels",
    "query": "query and key channels",
}
_IN_TURN: tuple[str, ...] = ("stream order", "stream signs", "stream", "heads", "query heads", "experts", "neurons")
_IN_TURN += ("value", "query", "mlp", "normalised", "norm")
"""Kinds in the order in which they are compared: each after those that what it is recognised by depends on."""


@dataclass(frozen=True)
class Difference:
    """What differs between the bases of two models.

    Attributes:
        what: `order`, `signs` or `scales`.
        kind: Kind of freedom, of `dissect.models.freedoms.kinds.KINDS`.
        layers: Layers in which it differs; empty for what is outside of them, such as the residual stream.
    """

    what: str
    kind: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        """Return what differs and the number of layers in words."""
        named = f"{self.what} of the {_UNITS[self.kind]}"
        return named if not self.layers else f"{named} of {len(self.layers)} layer{'s' * (len(self.layers) > 1)}"


def find_differences(base: Model, other: Model) -> list[Difference]:
    """Find how the basis in which a model is written differs from the base's.

    Args:
        base: The base.
        other: A model of the same architecture.

    Returns:
        Orders, signs and scales that differ; empty if the bases agree, or if no rewriting makes the models alike.
    """
    if base.hf is other.hf:
        return []
    key = base.sha256, other.sha256
    if key not in _known:
        if base.streamed is not None or other.streamed is not None:
            found = differing_on_disk(base, other)
        else:
            found = _undone(base, other)[0] if _is_suspected(base, other) else []
        _known[key] = _grouped(sorted(found, key=lambda one: _IN_TURN.index(one[1].kind)))
    return list(_known[key])


_known: dict[tuple[str, str], list[Difference]] = {}
"""What was found, by the content hashes of both models: several commands of a session ask about the same pair."""


def check_basis(base: Model, other: Model) -> None:
    """Check that a model is written in the base's basis.

    Args:
        base: The base.
        other: A model whose activations or weights are compared with the base's, place by place.

    Raises:
        InputError: Units stand in another order, or have other signs or scales than training gives them.
    """
    found = find_differences(base, other)
    if found:
        how = "Set `align`" if other.streamed is None else "Turn `stream` off and set `align`"
        raise InputError(
            f"{other.name} is written in another basis than {base.name} ({'; '.join(map(str, found))}), so that "
            f"activations and weights cannot be compared place by place. {how} to put it into the base's basis, "
            "which changes no output"
        )


def aligned(base: Model, other: Model) -> Model:
    """Put a model into the basis of the base: the order of channels, heads, experts and neurons, signs and scales.

    Orders and signs are restored exactly. A scale that was moved from one matrix to another is known only up to what
    training itself did to both of them, and is put where both sides are as close to the base's as they can be.

    Args:
        base: The base; its weights are in memory.
        other: A model of the same architecture; its weights are in memory, and it is not changed.

    Returns:
        A copy with the same outputs, or the model itself if the bases agree already.

    Raises:
        InputError: A model is streamed from disk.

    Examples:
        >>> from dissect import load_model
        >>> from dissect.models.rewriting import rewritten
        >>> base = load_model("demo:base", device="cpu")
        >>> moved = rewritten(base, seed=0, kinds=["neurons"])
        >>> [str(one) for one in find_differences(base, moved)]
        ['order of the MLP neurons of 8 layers']
        >>> find_differences(base, aligned(base, moved))
        []
    """
    for model in (base, other):
        if model.streamed is not None:
            raise InputError(f"`align` needs the weights of {model.name} in memory; turn `stream` off")
    if not find_differences(base, other):
        return other
    _, hf = _undone(base, other)
    share_epsilon(hf)
    return replace(other, hf=hf, sha256=content_hash(hf, name=other.name))


def _is_suspected(base: Model, other: Model) -> bool:
    """Return True if a freedom seems to differ that is not proven yet: a proof takes many forward passes."""
    candidates = Structure(base, base.hf, random_tokens(base))
    freedoms = [one for alternatives in candidates.scalings() for one in alternatives]
    everything: list[Freedom] = [*freedoms, *candidates.permutations()]
    if any(differs(base.hf, other.hf, one) for one in everything):
        return True
    # Other gains hide the order of what reads them, and the other way round; gains alone are suspicious too.
    return any(gains_differ(base.hf, other.hf, one) for one in freedoms if one.kind == "norm")


def _undone(base: Model, other: Model) -> tuple[list[tuple[str, Freedom]], "PreTrainedModel"]:
    """Undo, one after the other, what differs in a copy of a model.

    Returns:
        `order`, `signs` or `scales` with each freedom that differs, and the copy.
    """
    symmetries = find_symmetries(other)
    freedoms: list[Freedom] = [*symmetries.scalings, *symmetries.permutations]
    hf, plain, plain_base = copy.deepcopy(other.hf), copy.deepcopy(other.hf), copy.deepcopy(base.hf)
    # Everything but the gains is compared with gains of 1: scaled columns make rows unlike.
    for scaling in symmetries.scalings:
        if scaling.kind == "norm":
            fold(plain, scaling)
            fold(plain_base, scaling)
    # The scale of a matrix whose output is normalised says nothing about the units that it reads.
    free = {part.parameter for one in symmetries.scalings if one.kind == "normalised" for part in one.parts}
    found: list[tuple[str, Freedom]] = []
    for one in sorted(freedoms, key=lambda one: _IN_TURN.index(one.kind)):
        ours, theirs = (base.hf, hf) if one.kind == "norm" else (plain_base, plain)
        what = differs(ours, theirs, one)
        found += [(each, one) for each in what]
        if what and isinstance(one, Permutation):
            order = matching(theirs, ours, one)
            for model in (hf, plain):
                permute(model, one, order)
        elif what and isinstance(one, Scaling):
            factors = undoing_factors(ours, theirs, one, what, free)
            for model in (hf, plain):
                scale(model, one, factors)
    return found, hf


def _grouped(found: Iterable[tuple[str, Freedom]]) -> list[Difference]:
    layers: dict[tuple[str, str], list[int]] = {}
    for what, one in found:
        known = layers.setdefault((what, one.kind), [])
        if one.layer is not None and one.layer not in known:
            known.append(one.layer)
    return [Difference(what, kind, tuple(sorted(where))) for (what, kind), where in layers.items()]
