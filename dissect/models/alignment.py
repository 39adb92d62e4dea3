"""Test whether two models are written in one basis, and put the second one back into the first one's.

A merge, an export or a permuting optimiser may give a model whose neurons stand in another order than the base's, or
whose signs and scales were moved between matrices. It computes the same, but neuron 7 of the one is not neuron 7 of the
other: patched coefficients and restored weights are then noise. Units are recognised by their weights: in fine-tuned
models a unit is most similar to the unit at its own place, with the same sign, and training does not scale the two
sides of a freedom in opposite directions. Only what `find_symmetries` proves to change no output counts, and is undone.
"""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dissect.models.canonical import by_channel, fold, matching, similarity
from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import Part, Permutation, Scaling, permute, scale
from dissect.models.freedoms.norms import share_epsilon
from dissect.models.model import Model
from dissect.models.symmetries import find_symmetries, random_tokens
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 64
"""Units of a layer that are searched for at other places."""

MATCH = 0.6
"""Least similarity (mean absolute cosine of the rows) with a unit at another place that a moved unit has."""

GAIN = 0.25
"""How much more similar a moved unit is to the one at another place than to the one at its own."""

SHARE = 0.05
"""Share of a layer's units that must differ; of units in another order at least two."""

RECOGNISED = 0.5
"""Absolute cosine with the base's weights from which on a channel is the same one, so that its sign and scale count.

By chance two vectors of 32 numbers reach it once in 270 times, and both sides of a scaling once in 70,000."""

SHIFT = 0.15
"""Log factor by which a channel must have been multiplied on one side of a scaling and divided on the other.

Training does not do that: over all channels of the built-in pairs the smaller one of two opposite shifts is at most
.055 for norms and .025 for everything else. Shifts of one side alone are no evidence: they reach .7."""

SHIFT_ALONE = 0.5
"""The same where there is no other side: the scale of a matrix whose output is normalised. Training changes that too,
by weight decay, but not by so much without a change of direction."""

DEVIATIONS = 4.0
"""A shift must also be this many times what a random change of the same size makes of it."""

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

Freedom = Permutation | Scaling


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
        base: The base; its weights are in memory.
        other: A model of the same architecture; its weights are in memory.

    Returns:
        Orders, signs and scales that differ; empty if the bases agree, or if no rewriting makes the models alike.
    """
    if base.hf is other.hf:
        return []
    key = base.sha256, other.sha256
    if key not in _known:
        _known[key] = _grouped(_undone(base, other)[0]) if _is_suspected(base, other) else []
    return list(_known[key])


_known: dict[tuple[str, str], list[Difference]] = {}
"""What was found, by the content hashes of both models: several commands of a session ask about the same pair."""


def check_basis(base: Model, other: Model) -> None:
    """Check that a model is written in the base's basis.

    Args:
        base: The base.
        other: A model whose activations or weights are compared with the base's, place by place. Models that are
            streamed from disk are not checked.

    Raises:
        InputError: Units stand in another order, or have other signs or scales than training gives them.
    """
    if base.streamed is not None or other.streamed is not None:
        return
    found = find_differences(base, other)
    if found:
        raise InputError(
            f"{other.name} is written in another basis than {base.name} ({'; '.join(map(str, found))}), so that "
            "activations and weights cannot be compared place by place. Set `align` to put it into the base's basis, "
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
    if any(_differs(base.hf, other.hf, one) for one in everything):
        return True
    # Other gains hide the order of what reads them, and the other way round; gains alone are suspicious too.
    gains = [replace(one, parts=one.parts[:1]) for one in freedoms if one.kind == "norm"]
    return any(_gains_differ(_side(base.hf, other.hf, one.parts, one.n_channels)) for one in gains)


def _gains_differ(side: "_Side") -> bool:
    return float(((side.cosine < 0) | (side.shift.abs() >= SHIFT)).double().mean()) >= SHARE


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
        what = _differs(ours, theirs, one)
        found += [(each, one) for each in what]
        if what and isinstance(one, Permutation):
            order = matching(theirs, ours, one)
            for model in (hf, plain):
                permute(model, one, order)
        elif what and isinstance(one, Scaling):
            factors = _factors(ours, theirs, one, what, free)
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


def _differs(base: nn.Module, hf: nn.Module, one: Freedom) -> tuple[str, ...]:
    """Return what differs of a freedom: `order`, `signs`, `scales`, or nothing."""
    if isinstance(one, Permutation):
        return ("order",) if _is_reordered(base, hf, one) else ()
    flipped, scaled = _evidence(_sides(base, hf, one), one)
    needed = max(1, SHARE * one.n_channels)
    return tuple(what for what, where in (("signs", flipped), ("scales", scaled)) if int(where.sum()) >= needed)


# Orders


def _is_reordered(base: nn.Module, hf: nn.Module, permutation: Permutation) -> bool:
    matrices = [
        slots for slots in permutation.slots if slots.identifies and base.get_parameter(slots.parameter).dim() > 1
    ]
    if not matrices:
        return False
    own = torch.zeros(permutation.n_units, dtype=torch.float64)
    for slots in matrices:
        ours, theirs = (nn.functional.normalize(slots.units(model).float(), dim=2, eps=1e-30) for model in (base, hf))
        own += (ours * theirs.to(ours.device)).sum(2).abs().mean(1).double().cpu()
    own /= len(matrices)
    # The counterpart of a moved unit stands where another unit was: both places are poor.
    poor = (own < 1 - GAIN).nonzero().flatten()
    needed = max(2, SHARE * permutation.n_units)
    if len(poor) < needed:
        return False
    sample = poor[torch.linspace(0, len(poor) - 1, min(SAMPLE, len(poor))).long()]
    best = torch.zeros(len(sample), len(poor), dtype=torch.float64)
    for slots in matrices:
        of_base, of_other = replace(slots, rows=slots.rows[sample]), replace(slots, rows=slots.rows[poor])
        best += similarity(of_base.units(base), of_other.units(hf))
    most = (best / len(matrices)).max(1).values
    moved = (most >= MATCH) & (most > own[sample] + GAIN)
    return float(moved.double().mean()) * len(poor) >= needed


# Signs and scales


@dataclass(frozen=True, eq=False)
class _Side:
    """The weights of one side of a scaling in two models, for every channel.

    Attributes:
        cosine: Cosine of the other model's weights with the base's; 0 where either has none.
        shift: Log of the other model's share of the base's weights, in multiples of those.
        noise: Standard deviation of `shift` if the two differ by a random direction.
    """

    cosine: Float[Tensor, " n_channels"]
    shift: Float[Tensor, " n_channels"]
    noise: Float[Tensor, " n_channels"]

    @property
    def scale(self) -> Float[Tensor, " n_channels"]:
        """The part of `shift` that no change of direction explains: what the base's share of the other agrees on."""
        back = self.shift - 2 * self.cosine.abs().clamp(min=1e-3).log()
        nearer = torch.where(self.shift.abs() < back.abs(), self.shift, back)
        return torch.where(self.shift * back > 0, nearer, 0)


def _side(base: nn.Module, hf: nn.Module, parts: Iterable[Part], n_channels: int) -> _Side:
    product, ours, theirs, size = torch.zeros(4, n_channels, dtype=torch.float64)
    for part in parts:
        of_base = base.get_parameter(part.parameter).data + part.offset
        of_other = hf.get_parameter(part.parameter).data.to(of_base.device) + part.offset
        product += by_channel(of_base * of_other, part, n_channels)
        ours += by_channel(of_base.square(), part, n_channels)
        theirs += by_channel(of_other.square(), part, n_channels)
        size += by_channel(torch.ones_like(of_base), part, n_channels)
    alive = (ours > 0) & (theirs > 0) & (product != 0)
    cosine = torch.where(alive, product / (ours * theirs).sqrt().clamp(min=1e-300), 0)
    shift = torch.where(alive, (product.abs() / ours.clamp(min=1e-300)).clamp(min=1e-300).log(), 0)
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    return _Side(cosine, shift, sine / cosine.abs().clamp(min=1e-3) / size.clamp(min=1).sqrt())


def _sides(base: nn.Module, hf: nn.Module, scaling: Scaling) -> list[_Side]:
    """Return what a scaling multiplies and what it divides, matrices alone where there are any.

    What is added to the residual stream is one side for each parameter, since all of them are multiplied.
    """

    def matrices(parts: list[Part]) -> list[Part]:
        return [part for part in parts if base.get_parameter(part.parameter).dim() > 1] or parts

    if scaling.kind == "stream":
        first, *others = [part for part in scaling.parts if not part.inverse]  # embeddings, or the norm behind them
        chosen = [[part] for part in (first, *matrices(others))]
    elif scaling.kind == "stream signs":
        chosen = [list(scaling.parts[:1])]  # other parts have signs that depend on those of units too
    else:
        chosen = [matrices([p for p in scaling.parts if p.inverse == inverse]) for inverse in (False, True)]
    return [_side(base, hf, parts, scaling.n_channels) for parts in chosen if parts]


def _evidence(sides: list[_Side], scaling: Scaling) -> tuple[Bool[Tensor, " n_channels"], Bool[Tensor, " n_channels"]]:
    """Return the channels whose sign was changed, and those whose scale was."""
    sides = _that_count(sides, scaling)
    known = torch.stack([side.cosine.abs() >= RECOGNISED for side in sides]).all(0)
    flipped = known & torch.stack([side.cosine < 0 for side in sides]).all(0) & scaling.signs
    opposite = len(sides) == 2 and scaling.kind != "stream"
    # Of two sides, a change of direction shortens both; where all must move alike, it would look like a scale. The
    # first one tells, since units that are scaled too turn what is written to the stream.
    first, *others = sides
    shifts = torch.stack([first.shift if opposite else first.scale, *(side.shift for side in others)])
    clear = torch.stack([side.shift.abs() >= DEVIATIONS * side.noise for side in sides]).all(0)
    alike = shifts[0] * shifts[1] < 0 if opposite else (shifts > 0).all(0) | (shifts < 0).all(0)
    enough = SHIFT if opposite or scaling.kind == "stream" else SHIFT_ALONE
    scaled = known & clear & alike & (shifts.abs() >= enough).all(0) & scaling.magnitudes
    return flipped, scaled


def _that_count(sides: list[_Side], scaling: Scaling) -> list[_Side]:
    """Leave out what does not tell the scale of the residual stream: matrices whose units are scaled or moved too."""
    if scaling.kind != "stream":
        return sides
    embedding, *written = sides
    return [embedding, *(side for side in written if bool((side.cosine.abs() >= RECOGNISED).all()))]


def _factors(
    base: nn.Module, hf: nn.Module, scaling: Scaling, found: tuple[str, ...], free: Collection[str]
) -> Float[Tensor, " n_channels"]:
    """Return the factors that undo a scaling, channel by channel; the scale of `free` parameters does not count."""
    sides = _that_count(_sides(base, hf, scaling), scaling)
    factors = torch.ones(scaling.n_channels, dtype=torch.float64)
    if "signs" in found:
        factors[torch.stack([side.cosine < 0 for side in sides]).all(0)] = -1
    if "scales" in found:
        shifts = torch.stack([side.shift for side in sides])
        if len(sides) == 2 and scaling.kind != "stream":
            signed = torch.stack([shifts[0], -shifts[1]])
            told_by = [{part.parameter for part in scaling.parts if part.inverse == side} for side in (False, True)]
            telling = [parameters.isdisjoint(free) for parameters in told_by]
            moved = signed[telling if any(telling) else [True, True]].mean(0)
        else:
            moved = shifts.mean(0)
        known = torch.stack([side.cosine.abs() >= RECOGNISED for side in sides]).all(0)
        factors *= torch.where(known, (-moved).exp(), 1)
    return factors
