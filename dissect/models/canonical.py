"""Write a model in its canonical form: the same outputs, and no freedom left in how its weights are written.

Attacks work on weights, so a verdict could be moved by a rewriting that changes no output, such as larger norm gains
with smaller matrices behind them. In the canonical form every freedom of `dissect.models.symmetries` is fixed by a
convention that depends only on what the model computes:

1. Norm gains are 1: they are folded into the matrices that read the norm. A gain of exactly 0 stays.
2. The residual stream is scaled so that the embedding has the root mean square of `like`'s, by default `STREAM_RMS`,
   and the norms' epsilon follows. A constant, not the scale that was given, because that scale is a freedom itself:
   with the given one, the base's own form would depend on how the base was written. The value is a usual standard
   deviation of initial weights, so that numbers stay of the size that checkpoints have. Epsilon is no better anchor: a
   stream that was rescaled without it computes nearly the same, but would keep its scale.
3. Up and down projection, value and output, query and key get equal norms, for every channel.
4. A matrix whose output is normalised gets the root mean square of `like`'s, by default `STREAM_RMS` too.
5. The stream's channels, neurons, heads and experts are sorted by the norm of their weights, or matched to those of
   `like`; signs are those of `like`, or such that the sum of the cubes of a channel's weights is positive.

Steps 1 and 2 do not change what step 3 balances afterwards. Step 4 may take a factor out of one side of a balance; the
factor is squared there and the sides are balanced again, so that both conditions hold at the end.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dissect.models.freedoms.kinds import HasParameters, Part, Permutation, Scaling, Unproven, permute, scale
from dissect.models.freedoms.norms import share_epsilon
from dissect.models.model import Model
from dissect.models.symmetries import Symmetries, find_symmetries
from unlearning.checkpoints.hashing import content_hash

STREAM_RMS = 0.02
"""Root mean square of the embedding, and of matrices whose output is normalised, in a canonical form without `like`."""
_BALANCED = ("mlp", "value", "query")

Place = tuple[str, int | None, int | None]
"""Kind, layer and part of a permutation."""


@dataclass(frozen=True, eq=False)
class CanonicalForm:
    """A model in canonical form, and what was done to it.

    Attributes:
        model: The copy in canonical form.
        symmetries: The freedoms that were fixed, and the candidates that could not be proven.
        orders: For the units of every permutation the number that each had in the given model.
    """

    model: Model
    symmetries: Symmetries
    orders: Mapping[Place, Int[Tensor, " n_units"]]

    @property
    def unproven(self) -> tuple[Unproven, ...]:
        """Candidates that are no freedom of this model."""
        return self.symmetries.unproven

    def moved(self, like: "CanonicalForm") -> dict[str, int]:
        """Count units whose counterpart in another model had another place there.

        Args:
            like: Form of the model that this one was matched to.

        Returns:
            The number of units by kind, such as neurons; 0 where the given models had the same order.
        """
        counts: Counter[str] = Counter()
        for place, order in self.orders.items():
            counts[place[0]] += int((order != like.orders[place]).sum())
        return dict(counts)


def canonical(model: Model, *, like: Model | None = None) -> Model:
    """Return a copy of a model in canonical form, with the same outputs.

    Args:
        model: Model with its weights in memory; it is not changed.
        like: Model in canonical form, such as the base's, whose scales, signs and order of units are taken over; None
            for those of the model's own convention.

    Returns:
        The copy. Rewriting the weights of `model` without a change of its outputs changes it by rounding only.

    Raises:
        InputError: The model's weights are not in memory.

    Examples:
        >>> from dissect import load_model
        >>> from dissect.models.rewriting import rewritten
        >>> base = load_model("demo:base", device="cpu")
        >>> one, other = canonical(base), canonical(rewritten(base, seed=0))
        >>> largest = max(
        ...     float((ours - theirs).abs().max()) for ours, theirs in zip(one.hf.parameters(), other.hf.parameters())
        ... )
        >>> largest < 1e-4
        True
    """
    return canonical_form(model, like=like).model


def canonical_form(model: Model, *, like: Model | None = None) -> CanonicalForm:
    """Return the canonical form of a model with a record of what was done; see `canonical`."""
    symmetries = find_symmetries(model)
    hf = copy.deepcopy(model.hf)
    theirs = None if like is None else like.hf
    by_kind: dict[str, list[Scaling]] = {}
    for scaling in symmetries.scalings:
        by_kind.setdefault(scaling.kind, []).append(scaling)
    balanced = [scaling for kind in _BALANCED for scaling in by_kind.get(kind, ())]
    with torch.no_grad():
        for scaling in by_kind.get("norm", ()):
            fold(hf, scaling)
        for scaling in by_kind.get("stream", ()):
            scale(hf, scaling, _to_rms(hf, scaling, theirs))
        for scaling in balanced:
            _balance(hf, scaling)
        also_balanced = {part.parameter for scaling in balanced for part in scaling.parts if part.inverse}
        for scaling in by_kind.get("normalised", ()):
            halved = any(part.parameter in also_balanced for part in scaling.parts)
            scale(hf, scaling, _to_rms(hf, scaling, theirs) ** (2 if halved else 1))
        if "normalised" in by_kind:
            for scaling in balanced:
                _balance(hf, scaling)
        # Signs of the stream's channels come before those of units, whose weights lie along the stream.
        orders = {}
        for permutation in symmetries.permutations:
            if permutation.kind == "stream order":
                orders[_place(permutation)] = _put_in_order(hf, permutation, theirs)
        _fix_signs(hf, by_kind.get("stream signs", []), theirs)
        if theirs is None:
            _fix_signs(hf, balanced, None)
        for permutation in symmetries.permutations:
            if permutation.kind != "stream order":
                orders[_place(permutation)] = _put_in_order(hf, permutation, theirs)
        _fix_signs(hf, balanced, theirs)
    share_epsilon(hf)
    changed = replace(model, hf=hf, sha256=content_hash(hf, name=model.name))
    return CanonicalForm(changed, symmetries, orders)


@torch.no_grad()
def fold(hf: nn.Module, scaling: Scaling) -> None:
    """Make a norm's gains 1, in place: the matrices that read it are multiplied instead."""
    gain = scaling.parts[0]
    values = hf.get_parameter(gain.parameter)
    alive = values.double() + gain.offset != 0
    scale(hf, scaling, folding_factors(hf, scaling))
    values[alive] = 1 - gain.offset


@torch.no_grad()
def folding_factors(hf: HasParameters, scaling: Scaling) -> Float[Tensor, " n_channels"]:
    """Return the factors that make a norm's gains 1; a gain of exactly 0 stays."""
    gain = scaling.parts[0]
    total = hf.get_parameter(gain.parameter).double() + gain.offset
    alive = total != 0
    return torch.where(alive, 1 / torch.where(alive, total, 1), 1).cpu()


def _to_rms(hf: nn.Module, scaling: Scaling, like: nn.Module | None) -> Float[Tensor, " n_channels"]:
    """Return the factors that give a scaling's first part the root mean square of `like`'s, or the usual one."""
    part = scaling.parts[0]
    ours = _squares(hf, part, scaling.n_channels)
    touched = part.channels[part.channels >= 0]
    size = torch.bincount(touched, minlength=scaling.n_channels).double()
    size = size * (hf.get_parameter(part.parameter).numel() // part.channels.numel())
    theirs = size * STREAM_RMS**2 if like is None else _squares(like, part, scaling.n_channels)
    return _ratio(theirs, ours).sqrt()


def _balance(hf: nn.Module, scaling: Scaling) -> None:
    """Give both sides of a scaling equal norms, for every channel."""
    matrices = [part for part in scaling.parts if hf.get_parameter(part.parameter).dim() > 1] or scaling.parts
    sides = [
        sum((_squares(hf, part, scaling.n_channels) for part in matrices if part.inverse == inverse), torch.zeros(()))
        for inverse in (False, True)
    ]
    scale(hf, scaling, _ratio(sides[1], sides[0]) ** 0.25)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide, with 1 where either is 0: there is nothing to fix in a channel without weights."""
    alive = (above > 0) & (below > 0)
    return torch.where(alive, above, 1) / torch.where(alive, below, 1)


def _fix_signs(hf: nn.Module, scalings: list[Scaling], like: nn.Module | None) -> None:
    """Choose the sign of every channel: that of `like`, or a positive sum of cubes of the multiplied weights."""
    for scaling in scalings:
        if not scaling.signs:
            continue
        agreement = torch.zeros(scaling.n_channels, dtype=torch.float64)
        # Other parts of the stream have signs that depend on those of the units, which are not fixed yet.
        for part in scaling.parts if scaling.magnitudes else scaling.parts[:1]:
            ours = hf.get_parameter(part.parameter)
            if like is not None:
                product = (ours + part.offset) * (like.get_parameter(part.parameter).to(ours) + part.offset)
            elif not part.inverse:
                product = (ours + part.offset) ** 3
            else:
                continue
            agreement += by_channel(product, part, scaling.n_channels)
        scale(hf, scaling, torch.where(agreement < 0, -1.0, 1.0).double())


def _squares(hf: nn.Module, part: Part, n_channels: int) -> Float[Tensor, " n_channels"]:
    """Return the sum of the squares of each channel's values in a part."""
    return by_channel((hf.get_parameter(part.parameter) + part.offset).square(), part, n_channels)


def by_channel(values: Tensor, part: Part, n_channels: int) -> Float[Tensor, " n_channels"]:
    """Sum values by channel, in float64."""
    channels = part.channels.view((1,) * (values.dim() - part.channels.dim()) + part.channels.shape)
    alike = [dim for dim in range(values.dim()) if channels.shape[dim] == 1]
    sums = values.double() if not alike else values.sum(alike, keepdim=True, dtype=torch.float64)
    flat = channels.expand([channels.shape[dim] for dim in range(values.dim())]).flatten()
    touched = flat >= 0
    return torch.zeros(n_channels, dtype=torch.float64).index_add(0, flat[touched], sums.cpu().flatten()[touched])


def _place(permutation: Permutation) -> Place:
    return permutation.kind, permutation.layer, permutation.part


def _put_in_order(hf: nn.Module, permutation: Permutation, like: nn.Module | None) -> Int[Tensor, " n_units"]:
    order = _sorted_order(hf, permutation) if like is None else matching(hf, like, permutation)
    permute(hf, permutation, order)
    return order


def _sorted_order(hf: nn.Module, permutation: Permutation) -> Int[Tensor, " n_units"]:
    """Return the units from the largest norm to the smallest; equal ones by their content."""
    norms = torch.zeros(permutation.n_units, dtype=torch.float64)
    cubes = torch.zeros_like(norms)
    for slots in permutation.slots:
        units = slots.units(hf)
        if hf.get_parameter(slots.parameter).dim() > 1:
            norms += units.square().sum((1, 2), dtype=torch.float64).cpu()
        cubes += (units**3).sum((1, 2), dtype=torch.float64).cpu()
    return torch.from_numpy(np.lexsort((cubes.numpy(), -norms.numpy())))


def matching(hf: nn.Module, like: nn.Module, permutation: Permutation) -> Int[Tensor, " n_units"]:
    """Match the units of a model to those of another one by the similarity of their weights.

    Args:
        hf: Model whose units are matched.
        like: Model of the same architecture.
        permutation: The units.

    Returns:
        For every unit of `like` the number of its counterpart: the most similar one where that is a bijection, else the
        assignment with the largest sum (scipy's `linear_sum_assignment`) for those that are not each other's best.
    """
    similar = torch.zeros(permutation.n_units, permutation.n_units, dtype=torch.float64)
    for slots in permutation.slots:
        if slots.identifies and hf.get_parameter(slots.parameter).dim() > 1:
            similar += similarity(slots.units(like), slots.units(hf))
    best, back = similar.argmax(1), similar.argmax(0)
    places = torch.arange(permutation.n_units)
    mutual = back[best] == places
    order = torch.where(mutual, best, -1)
    if not bool(mutual.all()):
        rest = places[~mutual]
        free = places[~torch.isin(places, best[mutual])]
        chosen = similar[rest][:, free].numpy()
        _, columns = linear_sum_assignment(chosen, maximize=True)
        order[rest] = free[torch.from_numpy(columns)]
    return order


def similarity(ours: Float[Tensor, "n size width"], theirs: Float[Tensor, "m size width"]) -> Float[Tensor, "n m"]:
    """Return the mean absolute cosine of the rows of units; 0 for rows without weights. Signs are free, so absolute."""
    precise = torch.float64 if ours.dtype == torch.float64 else torch.float32
    ours, theirs = (nn.functional.normalize(units.to(precise), dim=2, eps=1e-30) for units in (ours, theirs))
    found = torch.zeros(len(ours), len(theirs), dtype=precise, device=ours.device)
    for row in range(ours.shape[1]):
        found += (ours[:, row] @ theirs[:, row].to(ours.device).T).abs()
    return (found / ours.shape[1]).double().cpu()
