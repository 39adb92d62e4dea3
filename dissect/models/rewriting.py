"""Rewrite a model's weights at random without a change of its outputs."""

import copy
import math
from collections.abc import Collection
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.freedoms.kinds import KINDS, Scaling, permute, random_factors, scale
from dissect.models.freedoms.norms import share_epsilon
from dissect.models.model import Model
from dissect.models.symmetries import find_symmetries
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError


def rewritten(model: Model, *, seed: int, largest: float = 100.0, kinds: Collection[str] | None = None) -> Model:
    """Return a copy of a model with other weights and the same outputs.

    Every freedom that `find_symmetries` proves is used: factors between 1 / `largest` and `largest`, log-uniform, for
    some tensors one common factor, for some one for each channel, for some both; random signs where they are free; and
    random orders of neurons, heads and experts. A scaled residual stream also changes the epsilon of the norms, which
    a saved checkpoint holds only where it is the same in all of them.

    Args:
        model: Model with its weights in memory; it is not changed.
        seed: Seed of factors and orders.
        largest: Largest factor, 1 or more; at 1 only signs and orders change.
        kinds: Kinds of freedom that are used, of `dissect.models.freedoms.kinds.KINDS`; by default all.

    Returns:
        The copy, with the content hash of its weights. Its outputs differ by the rounding of the model's dtype.

    Raises:
        InputError: `largest` is less than 1, a kind is unknown, or the model's weights are not in memory.

    Examples:
        >>> from dissect import load_model
        >>> model = load_model("demo:base", device="cpu")
        >>> other = rewritten(model, seed=0)
        >>> other.sha256 == model.sha256
        False
    """
    if not largest >= 1 or math.isinf(largest):
        raise InputError(f"`largest` must be a number of at least 1, got {largest}")
    chosen = set(KINDS if kinds is None else kinds)
    if unknown := chosen - set(KINDS):
        raise InputError(f"`kinds` must be some of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    symmetries = find_symmetries(model)
    generator = torch.Generator().manual_seed(seed)
    hf = copy.deepcopy(model.hf)
    for scaling in symmetries.scalings:
        if scaling.kind in chosen:
            scale(hf, scaling, _mixed_factors(scaling, largest, generator))
    for permutation in symmetries.permutations:
        if permutation.kind in chosen:
            permute(hf, permutation, torch.randperm(permutation.n_units, generator=generator))
    share_epsilon(hf)
    name = f"{model.name} rewritten {seed}"
    return replace(model, name=name, hf=hf, sha256=content_hash(hf, name=name))


def _mixed_factors(scaling: Scaling, largest: float, generator: torch.Generator) -> Float[Tensor, " n_channels"]:
    """Draw a common factor, one for each channel, or both, within the same bounds."""
    channels = random_factors(scaling, largest=largest, generator=generator)
    common = largest ** float(2 * torch.rand(1, generator=generator) - 1)
    which = int(torch.randint(3, (1,), generator=generator))
    if not scaling.magnitudes or scaling.exact and (which == 0 or scaling.n_channels == 1):
        return channels
    both = channels.sign() * common if which == 1 or not scaling.exact else channels * common
    return both.sign() * both.abs().clamp(1 / largest, largest)
