"""Compute what a model passes to its blocks for a batch, and for several copies of it."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.anatomy import Anatomy
from dissect.models.taken_apart import BlockArguments, recorded_inputs
from dissect.prompts.prompts import Batch


@dataclass(eq=False)
class BlockInputs:
    """What a model passes to its blocks for one batch.

    Attributes:
        hidden: Hidden states that enter the first block.
        arguments_of_one: Each block's other arguments.
        arguments_of_two: Each block's other arguments for the batch repeated twice. The dimensions that differ are
            those that grow with the batch.
        as_tuple: True if the model expects its blocks to return tuples.
    """

    hidden: Float[Tensor, "batch position d_model"]
    arguments_of_one: list[BlockArguments]
    arguments_of_two: list[BlockArguments]
    as_tuple: bool
    _repeated: dict[int, list[BlockArguments]] = field(default_factory=dict)

    def arguments(self, layer: int, copies: int) -> BlockArguments:
        """Return the arguments of one block for a batch that holds several copies of this one.

        Args:
            layer: Index of the block.
            copies: Number of copies of the batch.

        Returns:
            Positional and keyword arguments after the hidden states.
        """
        if copies not in self._repeated:
            memo: dict[int, Any] = {}
            self._repeated[copies] = [
                (_repeat(one[0], two[0], copies, memo), _repeat(one[1], two[1], copies, memo))
                for one, two in zip(self.arguments_of_one, self.arguments_of_two, strict=True)
            ]
        return self._repeated[copies][layer]


def _repeat(one: Any, two: Any, copies: int, memo: dict[int, Any]) -> Any:
    """Return an argument for several copies of a batch, given the arguments for one and for two copies."""
    if copies == 1:
        return one
    if id(one) in memo:  # most arguments are the same object in every layer
        return memo[id(one)]
    if isinstance(one, Tensor):
        batch_dims = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
        repeated: Any = torch.cat([one] * copies, batch_dims[0]) if batch_dims else one
    elif isinstance(one, tuple | list):
        repeated = type(one)(_repeat(a, b, copies, memo) for a, b in zip(one, two, strict=True))
    elif isinstance(one, dict):
        repeated = {key: _repeat(one[key], two[key], copies, memo) for key in one}
    else:
        repeated = one
    memo[id(one)] = repeated
    return repeated


def block_inputs(hf: Any, anatomy: Anatomy, batch: Batch) -> BlockInputs:
    """Compute what a model passes to its blocks for a batch; no block is run.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of its blocks.
        batch: Padded prompts, on the model's device.

    Returns:
        The hidden states that enter the first block, and every block's other arguments.

    Raises:
        InputError: The model computes something between its blocks, so they cannot be run one by one.
    """
    inputs: dict[str, Tensor | None] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "position_ids" in inspect.signature(hf.forward).parameters:
        inputs["position_ids"] = batch.position_ids
    twice = {name: None if value is None else torch.cat([value, value]) for name, value in inputs.items()}
    hidden, arguments, as_tuple = recorded_inputs(hf, anatomy, inputs)
    return BlockInputs(hidden, arguments, recorded_inputs(hf, anatomy, twice)[1], as_tuple)
