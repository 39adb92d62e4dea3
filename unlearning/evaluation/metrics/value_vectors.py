"""Value vectors: find the column of a down projection that a neuron writes, read it, and add noise to it.

The value vector of neuron `dim` in layer `layer` is what one unit of its coefficient adds to the residual stream:
a column of the layer's down projection.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearning.common.errors import InputError
from unlearning.objectives.forward import blocks

_NAMES = ("down_proj", "ff_out", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2")
"""Names of down projections, for blocks in which several linear layers have a down projection's shape."""


@dataclass(frozen=True)
class Place:
    """Layer and neuron of a value vector.

    Attributes:
        layer: Index of the layer, from 0.
        dim: Index of the neuron in the MLP's hidden width, from 0.
    """

    layer: int
    dim: int


def down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """Return the down projection of every block, which maps the MLP's hidden width to the residual stream.

    A block's down projection is its one linear layer outside the attention whose output has the width of the residual
    stream. Where several linear layers have it (an MLP no wider than the residual stream), the name decides.

    Returns:
        One module per layer, in order.

    Raises:
        InputError: A block has no such layer or several, such as a mixture of experts.
    """
    width = int(model.config.get_text_config().hidden_size)
    return [_down_projection(block, width, type(model).__name__) for block in blocks(model)]


def value_vector(projection: nn.Module, dim: int) -> Float[Tensor, " d_model"]:
    """Return one value vector as a view of the weight: writing to the vector changes the model.

    Args:
        projection: A down projection; see `down_projections`.
        dim: Index of the neuron.

    Returns:
        The vector, in the weight's dtype and on its device.
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.data[dim] if isinstance(projection, Conv1D) else weight.data[:, dim]


def check_place(model: PreTrainedModel, place: Place, *, concept: str, name: str) -> None:
    """Check that a model has a value vector.

    Args:
        model: The model.
        place: Layer and neuron.
        concept: Name of the concept, for the message.
        name: Name of the model, for the message.

    Raises:
        InputError: The model has no such layer or neuron.
    """
    projections = down_projections(model)
    advice = "Its vector was found in another model; leave the vectors out (`vectors=False`)."
    if place.layer >= len(projections):
        raise InputError(
            f"the layer of concept {concept!r} must be at most {len(projections) - 1} in {name}, got {place.layer}. "
            f"{advice}"
        )
    weight = projections[place.layer].weight
    assert isinstance(weight, Tensor)
    width = weight.numel() // int(model.config.get_text_config().hidden_size)
    if place.dim >= width:
        raise InputError(
            f"the dimension of concept {concept!r} must be at most {width - 1} in the MLPs of {name}, "
            f"got {place.dim}. {advice}"
        )


@contextmanager
def noised(vector: Float[Tensor, " d_model"], *, scale: float, seed: Sequence[int]) -> Iterator[None]:
    """Add Gaussian noise N(0, scale^2) to a value vector in place, and restore the vector bit for bit on exit.

    Args:
        vector: A view of a weight; see `value_vector`.
        scale: Standard deviation of the noise.
        seed: Seed of the noise, which is the same on every device.

    Yields:
        Nothing; the vector is noised inside the context.
    """
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(vector.shape[0]) * scale)
    clean = vector.clone()
    vector += noise.to(vector)
    try:
        yield
    finally:
        vector.copy_(clean)


def _down_projection(block: nn.Module, width: int, name: str) -> nn.Module:
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "attn" not in path and "attention" not in path:
            weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # [in, out]
            if weight.shape[1] == width:
                found[path] = (module, weight.shape[0])
    wider = {path: module for path, (module, inputs) in found.items() if inputs != width}
    named = {path: module for path, (module, _) in found.items() if path.rpartition(".")[2] in _NAMES}
    for candidates in (wider, named):
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    what = "several" if found else "no"
    raise InputError(
        f"{name}: a block has {what} linear layers that could be its down projection (a mixture of experts?), so the "
        "concepts' vectors cannot be found. Leave the vectors out (`vectors=False`)."
    )
