"""Run one block with some of its activations given, and leave out what is then not needed.

The block is the Hugging Face module itself, with its norms, residual sums, soft-capping and whatever else its authors
wrote. Only the forward of its attention, MLP or projections is replaced during one call.
"""

import inspect
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dissect.models.anatomy import Block, residual_of
from dissect.models.taken_apart import BlockArguments, replaced_forward
from dissect.runtime.memory import is_out_of_memory
from unlearning.common.errors import InputError

Extras = tuple[None, ...] | list[None] | None


@dataclass(frozen=True)
class MlpTraits:
    """Properties of an architecture's MLP, measured on a few random inputs.

    Attributes:
        mlp_per_position: True if the MLP takes and returns hidden states alone, position by position.
        mlp_ends_in_down_proj: True if the MLP's output is the down projection's output, unchanged.
        unused_modules: For a set of given outputs (`attn_out`, `mlp_out`), names of the block's other modules, such
            as norms, whose output is not used then.
    """

    mlp_per_position: bool
    mlp_ends_in_down_proj: bool
    unused_modules: dict[frozenset[str], tuple[str, ...]] = field(default_factory=dict)


@torch.inference_mode()
def find_mlp_traits(block: Block, states: Float[Tensor, "batch position d_model"]) -> MlpTraits:
    """Measure the properties of a block's MLP on random hidden states.

    Args:
        block: Modules of the block.
        states: Any hidden states of the model; only their width, dtype and device are used.

    Returns:
        The MLP's properties, without `unused_modules`.

    Raises:
        InputError: The MLP's output at one position depends on other positions, so the MLP cannot be run at selected
            positions only.
    """
    if block.mlp is None:
        return MlpTraits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    few = torch.randn(1, 3, states.shape[-1], generator=torch.Generator().manual_seed(0))
    few = few.to(states.device, states.dtype)
    activations = BlockActivations()
    try:
        with ExitStack() as stack:
            _record(stack, block, activations, (1, 3))
            output = block.mlp(few)
            alone = block.mlp(few[:, 1:2])
    except (TypeError, AttributeError):  # the MLP takes further arguments: a residual in Bloom, tokens in DeepSeek V4
        return MlpTraits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    if not isinstance(output, Tensor) or output.shape != few.shape:
        return MlpTraits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    tolerance = 1e-4 if states.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(alone, output[:, 1:2], rtol=tolerance, atol=tolerance * float(output.abs().max())):
        raise InputError(
            f"`engine` must be 'reference' for this model, got 'wavefront': {type(block.mlp).__name__} mixes positions"
        )
    if block.down_proj is None or activations.mlp_coef is None:
        return MlpTraits(mlp_per_position=True, mlp_ends_in_down_proj=False)
    # The second call was recorded last.
    ends = torch.equal(block.down_proj(activations.mlp_coef), alone)
    return MlpTraits(mlp_per_position=True, mlp_ends_in_down_proj=ends)


@torch.inference_mode()
def find_unused_modules(
    block: Block, hidden: Float[Tensor, "batch position d_model"], arguments: BlockArguments, traits: MlpTraits
) -> dict[frozenset[str], tuple[str, ...]]:
    """Find the modules of a block that need not be run if its attention's or MLP's output is given.

    Each module is made to return NaN. If the block, given its own activations, still returns the same values bit for
    bit, the module's output is not used. A module that returns another shape than it takes is always run, because an
    unused module is replaced by the identity.

    Args:
        block: Modules of the block.
        hidden: Hidden states that enter the block.
        arguments: The block's other arguments for these states.
        traits: Properties of the block's MLP.

    Returns:
        For each set of given outputs (`attn_out`, `mlp_out`), the names of the modules that are not used.
    """
    activations = BlockActivations()
    unchanged = run_block(block, hidden, arguments, BlockOverrides(), traits, activations=activations)
    extras = activations.extras()
    parts = {"attn_out": activations.attn_out, "mlp_out": activations.mlp_out}
    known = {name: states for name, states in parts.items() if states is not None}
    others = [
        (name, module)
        for name, module in block.whole.named_children()
        if not {block.attn, block.attn_out, block.mlp, block.mlp_out, block.down_proj} & set(module.modules())
    ]

    def is_unused(module: nn.Module, given: frozenset[str]) -> bool:
        attn_out, mlp_out = (known[name].clone() if name in given else None for name in ("attn_out", "mlp_out"))
        overrides = replace(extras, attn_out=attn_out, mlp_out=mlp_out)
        forward = module.forward
        same_shape = True

        def nan(*args: Any, **kwargs: Any) -> Any:
            nonlocal same_shape
            output, states = forward(*args, **kwargs), _first(*args, **kwargs)
            same_shape &= isinstance(output, Tensor) and output.shape == states.shape
            return output * torch.nan if same_shape else output

        with replaced_forward(module, nan):
            output = run_block(block, hidden, arguments, overrides, traits)
        return same_shape and torch.equal(output, unchanged)

    sets = [frozenset(names) for size in (1, 2) for names in itertools.combinations(known, size)]
    return {given: tuple(name for name, module in others if is_unused(module, given)) for given in sets}


@torch.inference_mode()
def check_positions(
    block: Block, hidden: Float[Tensor, "batch position d_model"], arguments: BlockArguments, traits: MlpTraits
) -> None:
    """Check that a block whose attention's output is given computes every position from that position alone.

    Later layers are run at the scored positions only, so nothing but the attention may read other positions.

    Args:
        block: Modules of the block.
        hidden: Hidden states that enter the block.
        arguments: The block's other arguments for these states.
        traits: Properties of the block's MLP.

    Raises:
        InputError: It does not.
    """
    activations = BlockActivations()
    run_block(block, hidden, arguments, BlockOverrides(), traits, activations=activations)
    attn_out = activations.attn_out
    if attn_out is None or hidden.shape[1] == 1:
        return
    given = replace(activations.extras(), attn_out=attn_out.clone())
    whole = run_block(block, hidden, arguments, given, traits)
    alone: Tensor | None = None
    try:
        given = replace(given, attn_out=attn_out[:, 1:].clone())
        alone = run_block(block, hidden[:, 1:].clone(), arguments, given, traits)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
    tolerance = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 5e-2
    expected, scale = whole[:, 1:], tolerance * float(whole.abs().max())
    if alone is None or alone.shape != expected.shape or not torch.allclose(alone, expected, tolerance, scale):
        raise InputError(
            f"`engine` must be 'reference' for this model, got 'wavefront': {type(block.whole).__name__} mixes "
            "positions outside its attention"
        )


@dataclass(frozen=True, eq=False)
class BlockOverrides:
    """Activations that are given to one block instead of being computed.

    Attributes:
        attn_out: Output of the attention.
        mlp_out: Output of the MLP.
        down_proj_out: Output of the down projection; used where the MLP changes that output before it returns.
        positions: Flat positions at which the MLP is run; None for all.
        limits_attention: True if the attention too writes at these positions only.
        attn_extras: See `BlockActivations`.
        mlp_extras: See `BlockActivations`.
        is_flat: See `BlockActivations`.
    """

    attn_out: Float[Tensor, "batch position d_model"] | None = None
    mlp_out: Float[Tensor, "batch position d_model"] | None = None
    down_proj_out: Float[Tensor, "batch position d_model"] | None = None
    positions: Int[Tensor, " kept"] | None = None
    limits_attention: bool = False
    attn_extras: Extras = None
    mlp_extras: Extras = None
    is_flat: bool = False


@dataclass(eq=False)
class BlockActivations:
    """Activations of one block on one batch.

    Attributes:
        attn_out: Output of the attention.
        mlp_coef: MLP coefficients, only at the positions where the MLP was run.
        mlp_out: Output of the MLP, zero where the MLP was not run.
        attn_extras: A tuple or list as long as what the attention returns after its output; None if it returns a
            tensor.
        mlp_extras: The same of the MLP.
        is_flat: True if the down projection sees batch and position as one dimension, as in OPT.
    """

    attn_out: Float[Tensor, "batch position d_model"] | None = None
    mlp_coef: Float[Tensor, "batch position d_mlp"] | None = None
    mlp_out: Float[Tensor, "batch position d_model"] | None = None
    attn_extras: Extras = None
    mlp_extras: Extras = None
    is_flat: bool = False

    def extras(self) -> BlockOverrides:
        """Return overrides that give nothing, but know the form in which the block's modules return their outputs."""
        return BlockOverrides(attn_extras=self.attn_extras, mlp_extras=self.mlp_extras, is_flat=self.is_flat)


def _record(stack: ExitStack, block: Block, activations: BlockActivations, shape: tuple[int, ...]) -> None:
    """Record a block's activations while the stack is open.

    Outputs are copied because the block may write into them afterwards: parallel blocks add up in place.
    """

    def copied(output: Any) -> tuple[Tensor, Extras]:
        if not isinstance(output, tuple | list):
            return _shaped(output, shape).clone(), None
        kind = list if isinstance(output, list) else tuple
        return _shaped(output[0], shape).clone(), kind([None] * (len(output) - 1))

    def attn_out(_module: nn.Module, _args: Any, output: Any) -> None:
        activations.attn_out = copied(output)[0]

    def attn(_module: nn.Module, _args: Any, output: Any) -> None:
        activations.attn_extras = copied(output)[1]

    def mlp_out(_module: nn.Module, _args: Any, output: Any) -> None:
        activations.mlp_out, activations.mlp_extras = copied(output)

    def mlp_coef(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        activations.mlp_coef, activations.is_flat = _shaped(args[0], shape), args[0].dim() == 2

    if block.attn_out is not None:
        stack.callback(block.attn_out.register_forward_hook(attn_out).remove)
    if block.attn is not None:
        stack.callback(block.attn.register_forward_hook(attn).remove)
    if block.mlp_out is not None:
        stack.callback(block.mlp_out.register_forward_hook(mlp_out).remove)
    if block.down_proj is not None:
        stack.callback(block.down_proj.register_forward_pre_hook(mlp_coef).remove)


def _shaped(states: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return states as [batch, position, width], also if a module sees the first two as one dimension."""
    return states.view(*shape, -1) if states.dim() == 2 and len(states) == shape[0] * shape[1] else states


def run_block(
    block: Block,
    hidden: Float[Tensor, "batch position d_model"],
    arguments: BlockArguments,
    overrides: BlockOverrides,
    traits: MlpTraits,
    *,
    activations: BlockActivations | None = None,
) -> Float[Tensor, "batch position d_model"]:
    """Run one block with some of its activations given.

    Args:
        block: Modules of the block.
        hidden: Hidden states that enter the block.
        arguments: The block's other arguments.
        overrides: Activations that are given instead of being computed.
        traits: Properties of the block's MLP.
        activations: Receives the activations of this run.

    Returns:
        The hidden states that leave the block.
    """
    with ExitStack() as stack:
        if overrides.attn_out is not None:
            assert block.attn is not None
            stack.enter_context(replaced_forward(block.attn, _attention_that_gives(block, overrides)))
        elif overrides.limits_attention and overrides.positions is not None:
            for projection in (block.q_proj, block.o_proj):
                if projection is not None:
                    stack.enter_context(replaced_forward(projection, at_positions(projection, overrides.positions)))
        _override_mlp(stack, block, overrides, traits)
        given = frozenset(name for name in ("attn_out", "mlp_out") if getattr(overrides, name) is not None)
        for name in traits.unused_modules.get(given, ()):
            stack.enter_context(replaced_forward(block.whole.get_submodule(name), _first))
        if activations is not None:
            _record(stack, block, activations, tuple(hidden.shape[:2]))
        output = block.whole(hidden, *arguments[0], **arguments[1])
    return output[0] if isinstance(output, tuple | list) else output


def _first(*args: Any, **kwargs: Any) -> Any:
    """Return the first argument, however it is given."""
    return args[0] if args else next(iter(kwargs.values()))


def _attention_that_gives(block: Block, overrides: BlockOverrides) -> Callable[..., Any]:
    """Return a forward of the attention that returns a given output; with the residual stream where it adds that."""
    given, extras = overrides.attn_out, overrides.attn_extras
    assert block.attn is not None and given is not None
    if block.attn_out is block.attn:
        return lambda *_args, **_kwargs: _with_extras(given, extras)
    signature = inspect.signature(block.attn.forward)

    def add(*args: Any, **kwargs: Any) -> Any:
        return _with_extras(given + residual_of(signature.bind(*args, **kwargs).arguments), extras)

    return add


def _override_mlp(stack: ExitStack, block: Block, overrides: BlockOverrides, traits: MlpTraits) -> None:
    if overrides.mlp_out is not None:
        assert block.mlp_out is not None
        given = _with_extras(overrides.mlp_out, overrides.mlp_extras)
        if overrides.is_flat and block.mlp_out is block.down_proj:
            given = overrides.mlp_out.flatten(0, 1)
        stack.enter_context(replaced_forward(block.mlp_out, lambda *_a, **_k: given))
    elif overrides.down_proj_out is not None:
        assert block.down_proj is not None
        output = overrides.down_proj_out.flatten(0, 1) if overrides.is_flat else overrides.down_proj_out
        stack.enter_context(replaced_forward(block.down_proj, lambda *_a, **_k: output))
    elif overrides.positions is not None and traits.mlp_per_position:
        assert block.mlp is not None
        stack.enter_context(replaced_forward(block.mlp, at_positions(block.mlp, overrides.positions)))


def _with_extras(given: Tensor, extras: Extras) -> Any:
    if extras is None:
        return given
    return [given, *extras] if isinstance(extras, list) else (given, *extras)


def at_positions(module: nn.Module, positions: Int[Tensor, " kept"]) -> Callable[[Tensor], Tensor]:
    """Return a module's forward that is run at selected positions only.

    Args:
        module: A module that takes and returns hidden states, position by position.
        positions: Flat positions, row * (positions of a row) + column.

    Returns:
        A function from states [batch, position, width] to outputs of that shape, zero at all other positions.
    """
    forward = module.forward

    def run(states: Tensor) -> Tensor:
        kept = states.flatten(0, 1)[positions.to(states.device)]
        return scatter(forward(kept[None])[0], positions, states.shape[:2])

    return run


def scatter(
    kept: Float[Tensor, "kept width"], positions: Int[Tensor, " kept"], shape: tuple[int, ...]
) -> Float[Tensor, "batch position width"]:
    """Return values at selected positions as a full tensor, zero elsewhere.

    Args:
        kept: Values at the positions.
        positions: Flat positions of the values.
        shape: Batch and position dimension of the result.

    Returns:
        A tensor of shape [batch, position, width].
    """
    everywhere = kept.new_zeros(shape[0] * shape[1], kept.shape[-1])
    everywhere[positions.to(kept.device)] = kept
    return everywhere.view(*shape, -1)
