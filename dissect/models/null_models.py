"""Make null models: the base moved as far as unlearning moved it, but in random directions."""

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from dissect.models.model import Model
from dissect.models.module_tree import with_values
from unlearning.common.errors import InputError


def null_model(base: Model, unlearned: Model, *, seed: int) -> Model:
    """Return the base with every tensor moved in a random direction by the norm of its update in unlearning.

    Nothing was unlearned in such a model, so its recovery is that of any diffuse change of this size. A tensor that
    unlearning did not change is not changed; a tied tensor moves once.

    Args:
        base: Model that is moved.
        unlearned: Model whose updates set the norms.
        seed: Seed of the directions.

    Returns:
        The null model; parameters that do not move are shared with the base.

    Raises:
        InputError: No null model can be made of these models; see `check_null`.
    """
    check_null(base, unlearned)
    theirs = dict(unlearned.hf.named_parameters(remove_duplicate=False))
    moved: dict[int, Tensor] = {}
    values = {}
    for name, parameter in base.hf.named_parameters(remove_duplicate=False):
        distance = float((theirs[name].data.double() - parameter.data.double()).norm())
        if distance == 0:
            continue
        if id(parameter) not in moved:
            moved[id(parameter)] = _moved(parameter.data, distance, seed=seed, name=name)
        values[name] = moved[id(parameter)]
    return replace(base, name=f"null {seed}", hf=with_values(base.hf, values), sha256=f"null {seed} of {base.sha256}")


def check_null(base: Model, unlearned: Model) -> None:
    """Check that null models can be made.

    Args:
        base: Model that is moved.
        unlearned: Model whose updates set the norms.

    Raises:
        InputError: The weights are not in memory, or the two models have the same weights.
    """
    if base.streamed is not None:
        raise InputError("`null` must be 0 for streamed models; turn `stream` off to use null models")
    if base.sha256 == unlearned.sha256:
        raise InputError(
            f"`null` must be 0 here: {base.name} and {unlearned.name} have the same weights, so there is no update to "
            "match"
        )


def _moved(values: Tensor, distance: float, *, seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    direction = torch.randn(values.shape, generator=generator)
    step = direction * (distance / float(direction.double().norm()))
    return (values.double() + step.to(values.device).double()).to(values.dtype)
