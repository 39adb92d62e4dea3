"""A Hugging Face model's own forward, taken apart at its blocks.

Nothing of a model is written down here again. To learn what enters the blocks and with which arguments (mask,
positions, rotary tables, sliding windows) the model's own forward is run with its blocks taken out; to get logits
it is run with blocks that hand on given states. So every decoder family works as its authors wrote it.
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

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's arguments after the hidden states."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward; its own is put back whatever happens.

    An attribute of the instance is what `nn.Module.__call__` finds first, so hooks go on working and no weight
    is touched.
    """
    mine = vars(module).get("forward")  # there already where accelerate dispatched the model
    module.forward = forward
    try:
        yield
    finally:
        if mine is None:
            del module.forward
        else:
            module.forward = mine


class _AtLastBlock(Exception):
    """The model's forward has come to where nothing more is to be learned."""


@dataclass(eq=False)
class Entry:
    """What a model gives to its blocks for one batch.

    Attributes:
        hidden: the states that enter the first block.
        calls: each block's other arguments.
        calls_of_two: the same for the batch twice over, which shows the dimensions that grow with it.
        as_tuple: whether the model takes its blocks' results from tuples.
    """

    hidden: Float[Tensor, "batch position d_model"]
    calls: list[Call]
    calls_of_two: list[Call]
    as_tuple: bool
    _expanded: dict[int, list[Call]] = field(default_factory=dict)

    def call(self, layer: int, copies: int) -> Call:
        """The arguments of one block when its batch holds so many copies of this one."""
        if copies not in self._expanded:
            memo: dict[int, Any] = {}
            self._expanded[copies] = [
                (_grown(one[0], two[0], copies, memo), _grown(one[1], two[1], copies, memo))
                for one, two in zip(self.calls, self.calls_of_two, strict=True)
            ]
        return self._expanded[copies][layer]


def _grown(one: Any, two: Any, copies: int, memo: dict[int, Any]) -> Any:
    """An argument for several copies of a batch, from those for one and for two."""
    if copies == 1:
        return one
    if id(one) in memo:  # most arguments are the same object in every layer
        return memo[id(one)]
    if isinstance(one, Tensor):
        grows = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
        grown: Any = torch.cat([one] * copies, grows[0]) if grows else one
    elif isinstance(one, tuple | list):
        grown = type(one)(_grown(a, b, copies, memo) for a, b in zip(one, two, strict=True))
    elif isinstance(one, dict):
        grown = {key: _grown(one[key], two[key], copies, memo) for key in one}
    else:
        grown = one
    memo[id(one)] = grown
    return grown


def enter(hf: Any, anatomy: Anatomy, batch: Batch) -> Entry:
    """What the model gives to its blocks for this batch; no block is run.

    Raises:
        InputError: something happens between the blocks, so that they cannot be run one by one.
    """
    inputs: dict[str, Tensor | None] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "position_ids" in inspect.signature(hf.forward).parameters:
        inputs["position_ids"] = batch.position_ids
    twice = {name: None if value is None else torch.cat([value, value]) for name, value in inputs.items()}
    hidden, calls, as_tuple = _recorded_calls(hf, anatomy, inputs)
    return Entry(hidden, calls, _recorded_calls(hf, anatomy, twice)[1], as_tuple)


def _recorded_calls(hf: Any, anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Tensor, list[Call], bool]:
    for as_tuple in (False, True):
        entered: list[Tensor] = []
        calls: list[Call] = []
        try:
            _run_without_blocks(hf, anatomy, inputs, entered, calls, as_tuple=as_tuple)
        except _AtLastBlock:
            if all(_same(hidden, entered[0]) for hidden in entered):
                return entered[0], calls, as_tuple
        except (TypeError, IndexError, AttributeError, RuntimeError) as error:
            if not calls or is_out_of_memory(error):  # not because of what a block handed on
                raise
    raise InputError(
        f"{type(hf).__name__} does something between its blocks, so they cannot be run one by one; "
        "use --engine reference"
    )


def _run_without_blocks(
    hf: Any, anatomy: Anatomy, inputs: dict[str, Any], entered: list[Tensor], calls: list[Call], *, as_tuple: bool
) -> None:
    blocks: Sequence[nn.Module] = hf.get_submodule(anatomy.blocks)

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        entered.append(hidden)
        calls.append((args[1:], kwargs))
        if len(calls) == len(blocks):
            raise _AtLastBlock
        return (hidden,) if as_tuple else hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, note))
        hf(**inputs, use_cache=False)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours is theirs or (ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.cpu()))


def logits_of(
    hf: Any, anatomy: Anatomy, hidden: Float[Tensor, "scored d_model"], *, as_tuple: bool
) -> Float[Tensor, "scored vocab"]:
    """The logits of states that left the last block: the model's own final norm, head and what follows it.

    Args:
        hf: the model.
        anatomy: where its blocks are.
        hidden: the states, from any rows and positions.
        as_tuple: whether its blocks return tuples; see `Entry`.

    Returns:
        The logits in float32 or wider.
    """
    states = hidden[:, None]

    def hand_on(*_args: Any, **_kwargs: Any) -> Any:
        return (states,) if as_tuple else states

    embedding = hf.get_input_embeddings().weight  # not read, so that it need not be in memory
    ignored = torch.zeros(len(hidden), 1, embedding.shape[-1], dtype=hidden.dtype, device=hidden.device)
    with ExitStack() as stack:
        for block in hf.get_submodule(anatomy.blocks):
            stack.enter_context(replaced_forward(block, hand_on))
        logits: Tensor = hf(inputs_embeds=ignored, use_cache=False).logits[:, 0]
    return logits if logits.dtype == torch.float64 else logits.float()
