"""Take a Hugging Face model's own forward apart at its blocks.

No part of a model is implemented here again. To find what enters the blocks and with which arguments (mask, positions,
rotary tables, sliding windows), the model's own forward is run with its blocks left out. To compute logits, the forward
is run with blocks that return given states. So every decoder family works as its authors wrote it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.models.anatomy import Anatomy
from dissect.runtime.memory import is_out_of_memory
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


def recorded_inputs(hf: Any, anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Tensor, list[BlockArguments], bool]:
    """Compute what a model passes to its blocks; no block is run.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of its blocks.
        inputs: Arguments of the model's forward.

    Returns:
        The hidden states that enter the first block, every block's other arguments, and True if the model expects its
        blocks to return tuples.

    Raises:
        InputError: The model computes something between its blocks, so they cannot be run one by one.
    """
    for as_tuple in (False, True):
        entered: list[Tensor] = []
        arguments: list[BlockArguments] = []
        try:
            _run_without_blocks(hf, anatomy, inputs, entered, arguments, as_tuple=as_tuple)
        except _LastBlockReached:
            if all(_same(hidden, entered[0]) for hidden in entered):
                return entered[0], arguments, as_tuple
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
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
