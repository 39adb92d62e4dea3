"""Say what a rewriting of weights touches, and do it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_SCALINGS = ("norm", "stream", "normalised", "mlp", "value", "query", "stream signs")
_PERMUTATIONS = ("stream order", "heads", "query heads", "experts", "neurons")
KINDS = (*_SCALINGS, *_PERMUTATIONS)
"""Kinds of freedom: scalings in the order in which the canonical form fixes them, then permutations, where units that
smaller units are recognised by, or that hold them, come first."""

WHOLE = torch.zeros(1, dtype=torch.long)
"""Channels of a scaling by one factor."""


class HasParameters(Protocol):
    """A module, or whatever else gives parameters by their names."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter with a name."""


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter's share in a scaling.

    Attributes:
        parameter: Name of the parameter.
        channels: Channel of each of its elements, broadcastable to its shape; -1 where it is not touched.
        inverse: The elements are divided by the factor instead of multiplied.
        offset: The model computes with the parameter plus this number; 1 for the norms of Gemma.
    """

    parameter: str
    channels: Int[Tensor, "..."]
    inverse: bool = False
    offset: float = 0.0

    def fits(self, hf: nn.Module) -> bool:
        """Return True if the channels can be broadcast to the parameter's shape."""
        shape = hf.get_parameter(self.parameter).shape
        ours = self.channels.shape
        if len(ours) > len(shape):
            return False
        return all(a in (1, b) for a, b in zip(reversed(ours), reversed(shape), strict=False))


@dataclass(frozen=True, eq=False)
class Scaling:
    """Factors that change no output: one for each channel, multiplied into some tensors and divided out of others.

    Attributes:
        kind: One of `KINDS`.
        layer: Index of the layer; None outside of the blocks.
        n_channels: Number of factors.
        parts: What is multiplied and what is divided.
        signs: Factors may be negative.
        magnitudes: Factors may be other than 1 and -1.
        eps: Norms' epsilons, as `module.attribute`, that are multiplied by the squared factor (by the squared geometric
            mean of several).
    """

    kind: str
    layer: int | None
    n_channels: int
    parts: tuple[Part, ...]
    signs: bool = True
    magnitudes: bool = True
    eps: tuple[str, ...] = ()

    def fits(self, hf: nn.Module) -> bool:
        """Return True if every part has the parameter's shape."""
        return all(part.fits(hf) and not _beyond(part.channels, self.n_channels) for part in self.parts)

    @property
    def exact(self) -> bool:
        """True unless one epsilon is shared by channels that may get different factors."""
        return not self.eps or self.n_channels == 1


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the units of a permutation lie in a parameter.

    Attributes:
        parameter: Name of the parameter.
        dim: Dimension along which the units lie.
        rows: Indices of each unit, [n_units, rows of a unit].
        inside: Index into the first dimension, which is then left out; None for the whole parameter.
        identifies: Units are recognised by these values; False where they depend on the order of smaller units.
    """

    parameter: str
    dim: int
    rows: Int[Tensor, "n_units size"]
    inside: int | None = None
    identifies: bool = True

    def fits(self, hf: nn.Module) -> bool:
        """Return True if the parameter has these units along this dimension."""
        shape = hf.get_parameter(self.parameter).shape[0 if self.inside is None else 1 :]
        return self.dim < len(shape) and not _beyond(self.rows, shape[self.dim])

    def view(self, hf: HasParameters) -> Tensor:
        """Return the values that hold the units; writing to them changes the model."""
        values = hf.get_parameter(self.parameter).data
        return values if self.inside is None else values[self.inside]

    def units(self, hf: HasParameters) -> Float[Tensor, "n_units size width"]:
        """Return a copy of the units' values."""
        chosen = self.view(hf).movedim(self.dim, 0)[self.rows.to(hf.get_parameter(self.parameter).device)]
        return chosen.reshape(*self.rows.shape, -1)


@dataclass(frozen=True, eq=False)
class Permutation:
    """Units whose order changes no output.

    Attributes:
        kind: One of `KINDS`.
        layer: Index of the layer; None for the channels of the residual stream.
        n_units: Number of units.
        slots: Where they lie.
        part: Number of the expert or of the key-value head that the units belong to, or a negative number for further
            MLPs of a layer; None where they are the layer's.
    """

    kind: str
    layer: int | None
    n_units: int
    slots: tuple[Slots, ...]
    part: int | None = None

    def fits(self, hf: nn.Module) -> bool:
        """Return True if every parameter has these units."""
        return all(slots.fits(hf) and len(slots.rows) == self.n_units for slots in self.slots)


@dataclass(frozen=True)
class Unproven:
    """A candidate that is no symmetry of this model, or that cannot be made exact."""

    kind: str
    layer: int | None
    reason: str


def _beyond(numbers: Int[Tensor, "..."], size: int) -> bool:
    return numbers.numel() > 0 and int(numbers.max()) >= size


@torch.no_grad()
def scale(hf: nn.Module, scaling: Scaling, factors: Float[Tensor, " n_channels"]) -> None:
    """Multiply the parts of a scaling by factors, in place, and let the norms' epsilons follow.

    Args:
        hf: Hugging Face model; it is changed.
        scaling: What is multiplied.
        factors: A factor for each channel, float64.
    """
    scale_parts(hf, scaling.parts, factors)
    for path in scaling.eps:
        set_epsilon(hf, path, epsilon(hf, path) * squared_mean(factors))


@torch.no_grad()
def scale_parts(hf: HasParameters, parts: Iterable[Part], factors: Float[Tensor, " n_channels"]) -> None:
    """Multiply parts of a scaling by factors, in place, and leave epsilons alone; see `scale`."""
    for part in parts:
        values = hf.get_parameter(part.parameter)
        across = torch.cat([factors, factors.new_ones(1)])[part.channels]  # -1 is the last one
        across = (1 / across if part.inverse else across).to(values.device)
        if part.offset:
            values.copy_((values.double() + part.offset) * across - part.offset)
        else:
            values.mul_(across.to(values.dtype))


def squared_mean(factors: Float[Tensor, " n_channels"]) -> float:
    """Return what a scaling by factors multiplies epsilons by: the square of their geometric mean."""
    return float(factors.abs().log().mean().exp()) ** 2


def epsilon(hf: nn.Module, path: str) -> float:
    """Return a norm's epsilon, given as `module.attribute`."""
    module, _, attribute = path.rpartition(".")
    return float(getattr(hf.get_submodule(module), attribute))


def set_epsilon(hf: nn.Module, path: str, value: float) -> None:
    """Set a norm's epsilon, given as `module.attribute`."""
    module, _, attribute = path.rpartition(".")
    setattr(hf.get_submodule(module), attribute, value)


@torch.no_grad()
def permute(hf: HasParameters, permutation: Permutation, order: Int[Tensor, " n_units"]) -> None:
    """Put units into another order, in place.

    Args:
        hf: Hugging Face model; it is changed.
        permutation: Where the units lie.
        order: For each place the number of the unit that comes there.
    """
    for slots in permutation.slots:
        values = slots.view(hf)
        rows = slots.rows.to(values.device)
        moved = values.index_select(slots.dim, rows[order.to(values.device)].flatten())
        values.index_copy_(slots.dim, rows.flatten(), moved)


def random_factors(scaling: Scaling, *, largest: float, generator: torch.Generator) -> Float[Tensor, " n_channels"]:
    """Draw log-uniform factors in [1/largest, largest], half of them negative where signs are free; float64."""
    exponents = 2 * torch.rand(scaling.n_channels, generator=generator, dtype=torch.float64) - 1
    factors = largest ** (exponents if scaling.magnitudes else 0 * exponents)
    if scaling.signs:
        factors = torch.where(torch.rand(scaling.n_channels, generator=generator) < 0.5, -factors, factors)
    return factors
