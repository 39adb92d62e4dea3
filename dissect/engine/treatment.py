"""One block run with parts of it replaced, and what a replacement makes pointless left out.

The block is the Hugging Face module as it is: norms, residual sums, soft-capping and whatever else its authors
wrote stay theirs. Only the forward of its attention, MLP or projections is swapped for the time of one call.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dissect.engine.blocks import Call, replaced_forward
from dissect.models.anatomy import Block
from unlearning.common.errors import InputError


@dataclass(frozen=True)
class Habits:
    """How an architecture's MLP behaves, found out on a few random states.

    Attributes:
        mlp_per_position: it takes states alone and gives states alone, position by position.
        mlp_ends_in_down_proj: what it writes is the down projection's output, untouched.
        idle: names of the block's other modules, as norms, whose output nothing reads where these parts are given.
    """

    mlp_per_position: bool
    mlp_ends_in_down_proj: bool
    idle: dict[frozenset[str], tuple[str, ...]] = field(default_factory=dict)


@torch.inference_mode()
def find_habits(block: Block, states: Float[Tensor, "batch position d_model"]) -> Habits:
    """Run a block's MLP on a few states to see what may be left out of it.

    Raises:
        InputError: what it gives at one position depends on others, so that it cannot be run at some positions only.
    """
    if block.mlp is None:
        return Habits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    few = torch.randn(1, 3, states.shape[-1], generator=torch.Generator().manual_seed(0))
    few = few.to(states.device, states.dtype)
    seen = Seen()
    try:
        with ExitStack() as stack:
            _watch(stack, block, seen, (1, 3))
            output = block.mlp(few)
            alone = block.mlp(few[:, 1:2])
    except TypeError:  # it wants more than states, as Bloom's, which adds the residual itself
        return Habits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    if not isinstance(output, Tensor) or output.shape != few.shape:
        return Habits(mlp_per_position=False, mlp_ends_in_down_proj=False)
    tolerance = 1e-4 if states.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(alone, output[:, 1:2], rtol=tolerance, atol=tolerance * float(output.abs().max())):
        raise InputError(
            f"{type(block.mlp).__name__} mixes positions, which the wavefront engine cannot cut; use --engine reference"
        )
    if block.down_proj is None or seen.coef is None:
        return Habits(mlp_per_position=True, mlp_ends_in_down_proj=False)
    ends = torch.equal(block.down_proj(seen.coef), alone)  # the second call's coefficients were seen last
    return Habits(mlp_per_position=True, mlp_ends_in_down_proj=ends)


@torch.inference_mode()
def find_idle(
    block: Block, hidden: Float[Tensor, "batch position d_model"], call: Call, habits: Habits
) -> dict[frozenset[str], tuple[str, ...]]:
    """Find which modules of a block need not be run where its attention's or MLP's output is given.

    Each is made to give NaN: where the block, given its own activations, still gives the same to the bit, nothing reads
    it. Those that give another shape than they take are left alone, since states will be handed on in their place.
    """
    seen = Seen()
    untreated = run_block(block, hidden, call, Treatment(), habits, seen=seen)
    extras = Treatment(attn_extras=seen.attn_extras, mlp_extras=seen.mlp_extras, is_flat=seen.is_flat)
    parts = {"attn": seen.attn, "mlp": seen.mlp if block.mlp is not None else None}
    known = {name: states for name, states in parts.items() if states is not None}
    others = [
        (name, module)
        for name, module in block.whole.named_children()
        if not {block.attn, block.mlp, block.down_proj} & set(module.modules())
    ]

    def is_idle(module: nn.Module, given: frozenset[str]) -> bool:
        attn, mlp = (known[name].clone() if name in given else None for name in ("attn", "mlp"))
        treatment = replace(extras, attn=attn, mlp=mlp)
        forward = module.forward
        same_shape = True

        def nan(states: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal same_shape
            output = forward(states, *args, **kwargs)
            same_shape &= isinstance(output, Tensor) and output.shape == states.shape
            return output * torch.nan if same_shape else output

        with replaced_forward(module, nan):
            output = run_block(block, hidden, call, treatment, habits)
        return same_shape and torch.equal(output, untreated)

    sets = [frozenset(names) for size in (1, 2) for names in itertools.combinations(known, size)]
    return {given: tuple(name for name, module in others if is_idle(module, given)) for given in sets}


@dataclass(eq=False)
class Seen:
    """Activations of one block on one batch.

    Attributes:
        attn: output of the attention.
        coef: MLP coefficients, only at the positions where the MLP was run.
        mlp: output of the MLP, zero where it was not run.
        attn_extras: how many more values the attention returns beside its output, None where it returns it bare.
        mlp_extras: the same of the MLP.
        is_flat: whether the down projection sees batch and position as one dimension, as OPT's.
    """

    attn: Float[Tensor, "batch position d_model"] | None = None
    coef: Float[Tensor, "batch position d_mlp"] | None = None
    mlp: Float[Tensor, "batch position d_model"] | None = None
    attn_extras: int | None = None
    mlp_extras: int | None = None
    is_flat: bool = False


def _watch(stack: ExitStack, block: Block, seen: Seen, shape: tuple[int, ...]) -> None:
    """Note a block's activations in `seen` while the stack is open.

    They are copied where the block could write into them afterwards: parallel ones add up in place.
    """

    def kept(output: Any) -> tuple[Tensor, int | None]:
        states, extras = (output[0], len(output) - 1) if isinstance(output, tuple) else (output, None)
        return _shaped(states, shape).clone(), extras

    def attn(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.attn, seen.attn_extras = kept(output)

    def mlp(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.mlp, seen.mlp_extras = kept(output)

    def coef(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.coef, seen.is_flat = _shaped(args[0], shape), args[0].dim() == 2

    if block.attn is not None:
        stack.callback(block.attn.register_forward_hook(attn).remove)
    if block.mlp is not None:
        stack.callback(block.mlp.register_forward_hook(mlp).remove)
    elif block.down_proj is not None:
        stack.callback(block.down_proj.register_forward_hook(mlp).remove)
    if block.down_proj is not None:
        stack.callback(block.down_proj.register_forward_pre_hook(coef).remove)


def _shaped(states: Tensor, shape: tuple[int, ...]) -> Tensor:
    """States by batch and position, also where a module sees them as one dimension."""
    return states.view(*shape, -1) if states.dim() == 2 and len(states) == shape[0] * shape[1] else states


@dataclass(frozen=True, eq=False)
class Treatment:
    """What one block gets instead of computing it.

    Attributes:
        attn: the attention's output.
        mlp: the MLP's output.
        down_output: the down projection's output, where the MLP does something with it.
        positions: flat positions at which the MLP is run, None for all.
        last: whether attention too has to write at these positions only.
        attn_extras: see `Seen`.
        mlp_extras: see `Seen`.
        is_flat: see `Seen`.
    """

    attn: Float[Tensor, "batch position d_model"] | None = None
    mlp: Float[Tensor, "batch position d_model"] | None = None
    down_output: Float[Tensor, "batch position d_model"] | None = None
    positions: Int[Tensor, " kept"] | None = None
    last: bool = False
    attn_extras: int | None = None
    mlp_extras: int | None = None
    is_flat: bool = False


def run_block(
    block: Block,
    hidden: Float[Tensor, "batch position d_model"],
    call: Call,
    treatment: Treatment,
    habits: Habits,
    *,
    seen: Seen | None = None,
) -> Float[Tensor, "batch position d_model"]:
    """Run one block under a treatment; `seen` receives its activations."""
    with ExitStack() as stack:
        if treatment.attn is not None:
            assert block.attn is not None
            output = _with_extras(treatment.attn, treatment.attn_extras)
            stack.enter_context(replaced_forward(block.attn, lambda *_a, **_k: output))
        elif treatment.last and treatment.positions is not None:
            for projection in (block.q_proj, block.o_proj):
                if projection is not None:
                    stack.enter_context(replaced_forward(projection, at_positions(projection, treatment.positions)))
        _treat_mlp(stack, block, treatment, habits)
        given = frozenset(name for name in ("attn", "mlp") if getattr(treatment, name) is not None)
        for name in habits.idle.get(given, ()):
            stack.enter_context(replaced_forward(block.whole.get_submodule(name), lambda states, *_a, **_k: states))
        if seen is not None:
            _watch(stack, block, seen, tuple(hidden.shape[:2]))
        output = block.whole(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def _treat_mlp(stack: ExitStack, block: Block, treatment: Treatment, habits: Habits) -> None:
    if treatment.mlp is not None:
        assert block.mlp is not None
        given = _with_extras(treatment.mlp, treatment.mlp_extras)
        stack.enter_context(replaced_forward(block.mlp, lambda *_a, **_k: given))
    elif treatment.down_output is not None:
        assert block.down_proj is not None
        output = treatment.down_output.flatten(0, 1) if treatment.is_flat else treatment.down_output
        stack.enter_context(replaced_forward(block.down_proj, lambda *_a, **_k: output))
    elif treatment.positions is not None and habits.mlp_per_position:
        assert block.mlp is not None
        stack.enter_context(replaced_forward(block.mlp, at_positions(block.mlp, treatment.positions)))


def _with_extras(given: Tensor, extras: int | None) -> Any:
    return given if extras is None else (given, *[None] * extras)


def at_positions(module: nn.Module, positions: Int[Tensor, " kept"]) -> Callable[[Tensor], Tensor]:
    """A module's forward, run at some flat positions only; zero elsewhere."""
    forward = module.forward

    def run(states: Tensor) -> Tensor:
        kept = states.flatten(0, 1)[positions.to(states.device)]
        return spread(forward(kept[None])[0], positions, states.shape[:2])

    return run


def spread(
    kept: Float[Tensor, "kept width"], positions: Int[Tensor, " kept"], shape: tuple[int, ...]
) -> Float[Tensor, "batch position width"]:
    """Values at some flat positions in place, zero elsewhere."""
    everywhere = kept.new_zeros(shape[0] * shape[1], kept.shape[-1])
    everywhere[positions.to(kept.device)] = kept
    return everywhere.view(*shape, -1)
