"""Compare the weights of two models under one freedom: do they differ in order, signs or scales?

What is compared is read with `get_parameter` alone, so the weights may be in memory or on disk.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dissect.models.canonical import by_channel, similarity
from dissect.models.freedoms.kinds import HasParameters, Part, Permutation, Scaling

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

Freedom = Permutation | Scaling


def differs(base: HasParameters, hf: HasParameters, one: Freedom) -> tuple[str, ...]:
    """Return what differs of a freedom: `order`, `signs`, `scales`, or nothing."""
    if isinstance(one, Permutation):
        return ("order",) if _is_reordered(base, hf, one) else ()
    flipped, scaled = _evidence(_sides(base, hf, one), one)
    needed = max(1, SHARE * one.n_channels)
    return tuple(what for what, where in (("signs", flipped), ("scales", scaled)) if int(where.sum()) >= needed)


# Orders


def _is_reordered(base: HasParameters, hf: HasParameters, permutation: Permutation) -> bool:
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


def _side(base: HasParameters, hf: HasParameters, parts: Iterable[Part], n_channels: int) -> _Side:
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


def _sides(base: HasParameters, hf: HasParameters, scaling: Scaling) -> list[_Side]:
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


def undoing_factors(
    base: HasParameters, hf: HasParameters, scaling: Scaling, found: tuple[str, ...], free: Collection[str]
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


def gains_differ(base: HasParameters, hf: HasParameters, norm: Scaling) -> bool:
    """Return True if a norm's gains differ by more than training changes: that alone is suspicious, but no proof."""
    side = _side(base, hf, norm.parts[:1], norm.n_channels)
    return float(((side.cosine < 0) | (side.shift.abs() >= SHIFT)).double().mean()) >= SHARE
