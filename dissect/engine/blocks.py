"""Take a Hugging Face model's own forward apart at its blocks.

No part of a model is implemented here again. To find what enters the blocks and with which arguments (mask, positions,
rotary tables, sliding windows), the model's own forward is run with its blocks left out. To compute logits, the forward
is run with blocks that return given states. So every decoder family works as its authors wrote it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.engine.chunk import is_out_of_memory
from dissect.models.anatomy import Anatomy
from dissect.prompts.prompts import Batch
from unlearning.common.errors import InputError

BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block after the hidden states."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward, and put its own forward back at the end.

    `nn.Module.__call__` finds an attribute of the instance first, so hooks go on working and no weight is touched.

    Args:
        module: Any module of a model.
        forward: Function to run in place of the module's forward.

    Yields:
        Nothing; the forward is replaced while the context is open.
    """
    own = vars(module).get("forward")  # set on the instance where accelerate dispatched the model
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _LastBlockReached(Exception):
    """Raised to stop the forward pass after the last block's inputs were recorded."""


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
    hidden, arguments, as_tuple = _recorded_inputs(hf, anatomy, inputs)
    return BlockInputs(hidden, arguments, _recorded_inputs(hf, anatomy, twice)[1], as_tuple)


def _recorded_inputs(hf: Any, anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Tensor, list[BlockArguments], bool]:
    for as_tuple in (False, True):
        entered: list[Tensor] = []
        arguments: list[BlockArguments] = []
        try:
            _run_without_blocks(hf, anatomy, inputs, entered, arguments, as_tuple=as_tuple)
        except _LastBlockReached:
            if all(_same(hidden, entered[0]) for hidden in entered):
                return entered[0], arguments, as_tuple
        except (TypeError, IndexError, AttributeError, RuntimeError) as error:
            if not arguments or is_out_of_memory(error):  # not caused by what a block returned
                raise
    raise InputError(
        f"{type(hf).__name__} computes something between its blocks, so they cannot be run one by one; "
        "use `engine` 'reference'"
    )


def _run_without_blocks(
    hf: Any,
    anatomy: Anatomy,
    inputs: dict[str, Any],
    entered: list[Tensor],
    arguments: list[BlockArguments],
    *,
    as_tuple: bool,
) -> None:
    blocks: Sequence[nn.Module] = hf.get_submodule(anatomy.blocks)

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        entered.append(hidden)
        arguments.append((args[1:], kwargs))
        if len(arguments) == len(blocks):
            raise _LastBlockReached
        return (hidden,) if as_tuple else hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, record))
        hf(**inputs, use_cache=False)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours is theirs or (ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.cpu()))


def logits_of(
    hf: Any, anatomy: Anatomy, hidden: Float[Tensor, "scored d_model"], *, as_tuple: bool
) -> Float[Tensor, "scored vocab"]:
    """Compute the logits of states that left the last block, with the model's own final norm, head and what follows.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of its blocks.
        hidden: Hidden states, from any rows and positions.
        as_tuple: True if its blocks return tuples; see `BlockInputs`.

    Returns:
        The logits, in float32 or wider.
    """
    states = hidden[:, None]

    def return_states(*_args: Any, **_kwargs: Any) -> Any:
        return (states,) if as_tuple else states

    embedding = hf.get_input_embeddings().weight  # only the shape is read: a streamed model holds no values here
    ignored = torch.zeros(len(hidden), 1, embedding.shape[-1], dtype=hidden.dtype, device=hidden.device)
    with ExitStack() as stack:
        for block in hf.get_submodule(anatomy.blocks):
            stack.enter_context(replaced_forward(block, return_states))
        logits: Tensor = hf(inputs_embeds=ignored, use_cache=False).logits[:, 0]
    return logits if logits.dtype == torch.float64 else logits.float()
