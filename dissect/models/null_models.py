"""Models that were moved as far from the base as unlearning moved it, but in random directions."""

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from dissect.models.model import Model
from dissect.models.parameter_swap import with_values
from unlearning.common.errors import InputError


def null_model(base: Model, unlearned: Model, *, seed: int) -> Model:
    """The base with every tensor moved in a random direction by the norm of its own update in unlearning.

    Whatever recovery such a model shows is what any diffuse change of this size would show: nothing was unlearned in
    it. A tensor that unlearning left alone is left alone; a tied one moves once.

    Args:
        base: where it starts.
        unlearned: whose updates give the norms.
        seed: of the directions.

    Raises:
        InputError: see `check_null`.
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

    Raises:
        InputError: the weights are not in memory, or the two models are the same.
    """
    if base.streamed is not None:
        raise InputError("--null needs the models in memory; leave --stream out")
    if base.sha256 == unlearned.sha256:
        raise InputError(f"--null: {base.name} and {unlearned.name} have the same weights; there is no update to match")


def _moved(values: Tensor, distance: float, *, seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    direction = torch.randn(values.shape, generator=generator)
    step = direction * (distance / float(direction.double().norm()))
    return (values.double() + step.to(values.device).double()).to(values.dtype)
