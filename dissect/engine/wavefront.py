"""Run every intervention in one pass over the layers of both models.

In each layer the base's block is run once, and its activations at the sites are kept. Then the target's block is run
on the target's residual stream and on every branch that forked from it (see `schedule`), in chunks of a size that the
machine multiplies fast. What a replacement makes unnecessary is not computed (see `overrides`). Activations of only one
layer are kept at a time.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.engine import Advance, Sweep, targets_of
from dissect.engine.blocks import block_inputs
from dissect.engine.chunk import Chunk
from dissect.engine.layer_run import DonorActivations, LayerRun, ModelState, model_state
from dissect.engine.layers import Layers
from dissect.engine.overrides import (
    BlockActivations,
    BlockOverrides,
    MlpTraits,
    check_positions,
    find_mlp_traits,
    find_unused_modules,
    run_block,
)
from dissect.engine.proof import prove_taken_apart, prove_weights_only
from dissect.engine.schedule import Schedule, make_schedule
from dissect.interventions.donors import Donor
from dissect.interventions.intervention import NO_SITES, Intervention
from dissect.models.anatomy import Block
from dissect.models.model import Model
from dissect.models.parameter_swap import restored_model
from dissect.models.taken_apart import logits_of
from dissect.prompts.prompts import Batch
from unlearning.common.errors import InputError


@dataclass(frozen=True, eq=False)
class _BatchState:
    """States of all models for one batch; `donor` is None if the base gives its own activations."""

    base: ModelState
    donor: ModelState | None
    targets: list[ModelState]


def _needs_own_pass(donor: Donor, base: Model) -> bool:
    return donor.model is not base or bool(donor.tokens)


def _target_state(model: Model, batch: Batch, schedule: Schedule, donor: Donor) -> ModelState:
    """Return a target's state, with the branches that differ before the first layer."""
    state = model_state(model, batch)
    for branch, restored in schedule.starts.items():
        if restored:
            hf = restored_model(model, donor.model, restored, "before")
            state.branches[branch] = block_inputs(hf, model.anatomy, state.batch).hidden
    return state


def sweep(
    layers: Layers,
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    donor: Donor,
    chunk: Chunk,
    advance: Advance,
) -> Iterator[list[Sweep]]:
    """Run all interventions in one pass over the layers, with all batches together.

    Batches much longer than a chunk are split into rows of equal number; they keep their padding, so that no position
    shifts.

    Args:
        layers: Models of the sweep: the base, then the donor's model if it is another one, then the targets.
        batches: Padded prompts.
        interventions: Interventions on each target.
        donor: Source of activations and weights.
        chunk: Number of tokens that go through a block at once.
        advance: Called after each layer.

    Yields:
        For each batch, one sweep of each target.
    """
    pieces = [batch.pieces(_rows_of_piece(batch, chunk)) for batch in batches]
    flat = [piece for pieces_of_batch in pieces for piece in pieces_of_batch]
    results = run_pass(layers, flat, interventions, donor, chunk, advance)
    with closing(results):
        for pieces_of_batch in pieces:
            by_target = zip(*[next(results) for _ in pieces_of_batch], strict=True)
            yield [_join(parts) for parts in by_target]


def _rows_of_piece(batch: Batch, chunk: Chunk) -> int:
    rows, positions = batch.input_ids.shape
    return math.ceil(rows / max(1, round(rows * positions / chunk.tokens)))


def _join(parts: Sequence[Sweep]) -> Sweep:
    """Return the sweep of a batch, given the sweeps of its pieces."""
    if len(parts) == 1:
        return parts[0]
    return Sweep(
        torch.cat([part.base for part in parts]),
        torch.cat([part.target for part in parts]),
        (torch.cat(logits) for logits in zip(*[part.intervened for part in parts], strict=True)),
    )


@torch.inference_mode()
def run_pass(
    layers: Layers,
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    donor: Donor,
    chunk: Chunk,
    advance: Advance,
) -> Generator[list[Sweep]]:
    """Go through the layers once, with all batches and interventions together.

    Args:
        layers: Models of the sweep: the base, then the donor's model if it is another one, then the targets.
        batches: Padded prompts; small batches, because chunks are made of whole batches.
        interventions: Interventions on each target.
        donor: Source of activations and weights.
        chunk: Number of tokens that go through a block at once.
        advance: Called after each layer.

    Yields:
        For each batch, one sweep of each target.
    """
    base, targets = layers.models[0], targets_of(layers.models, donor)
    if base.weights.problem:
        raise InputError(f"`engine` must be 'reference' for {base.name}, got 'wavefront': {base.weights.problem}")
    schedule = make_schedule(interventions, base.n_layers)
    prove_weights_only(donor.model, targets, batches[0])
    with layers.embedding():
        batch_states = [
            _BatchState(
                base=model_state(base, batch),
                donor=model_state(donor.model, donor.batch(batch)) if _needs_own_pass(donor, base) else None,
                targets=[_target_state(target, batch, schedule, donor) for target in targets],
            )
            for batch in batches
        ]
        one_row = model_state(base, batches[0].pieces(1)[0].trimmed())
    known: dict[object, MlpTraits] = {}
    with closing(layers.blocks()) as all_blocks:  # closed at once: a thread may be reading for it
        for layer, blocks in enumerate(all_blocks):
            donor_block, *target_blocks = blocks[-len(targets) - 1 :]  # the base's block if the base is the donor
            form = tuple((name, type(module)) for name, module in blocks[0].whole.named_modules())
            is_new = form not in known
            if is_new:  # blocks of one model may differ from layer to layer, such as dense ones beside mixtures
                known[form] = _mlp_traits(layer, blocks[0], one_row)
            traits = known[form]
            for states in batch_states:
                activations = _run_source(layer, blocks[0], states.base, schedule, traits, check=is_new)
                if states.donor is not None:
                    activations = _run_source(layer, donor_block, states.donor, schedule, traits, check=is_new)
                given = DonorActivations(donor, states.donor or states.base, donor_block, layer, activations)
                for block, state in zip(target_blocks, states.targets, strict=True):
                    LayerRun(layer, block, state, given, traits).run(schedule.layers[layer], chunk)
            advance(1 / schedule.n_layers)
    with layers.head():
        for states in batch_states:
            logits = next(_logits(states.base, [(0, NO_SITES)], donor, chunk))
            if states is batch_states[0]:
                prove_taken_apart(base, batches[0], logits)
            yield [
                Sweep(
                    logits.to(state.model.device),
                    next(_logits(state, [(0, NO_SITES)], donor, chunk)),
                    _logits(state, schedule.ends, donor, chunk),
                )
                for state in states.targets
            ]


def _mlp_traits(layer: int, block: Block, one_row: ModelState) -> MlpTraits:
    hidden, arguments = one_row.inputs.hidden, one_row.inputs.arguments(layer, 1)
    traits = find_mlp_traits(block, hidden)
    check_positions(block, hidden, arguments, traits)
    return replace(traits, unused_modules=find_unused_modules(block, hidden, arguments, traits))


@torch.inference_mode()
def _logits(
    state: ModelState, ends: Sequence[tuple[int, frozenset[str]]], donor: Donor, chunk: Chunk
) -> Iterator[Float[Tensor, "scored vocab"]]:
    """Yield the logits of branches after the last layer; branches with the same head are computed together."""
    n_scored = len(state.scored)
    for restored, group in groupby(ends, key=lambda end: end[1]):
        model = state.model
        hf = restored_model(model, donor.model, restored, "after") if restored else model.hf
        branches = [branch for branch, _ in group]
        n_at_once = chunk.n_items(n_scored)
        for first in range(0, len(branches), n_at_once):
            hidden = torch.cat([state.branches[branch][0] for branch in branches[first : first + n_at_once]])
            logits = logits_of(hf, model.anatomy, hidden, as_tuple=state.inputs.as_tuple)
            yield from logits.to(model.device).split(n_scored)


def _run_source(
    layer: int, block: Block, state: ModelState, schedule: Schedule, traits: MlpTraits, *, check: bool
) -> BlockActivations:
    """Run one layer of the base or the donor, and return its activations; check them where that is asked for."""
    is_last = layer == schedule.n_layers - 1
    activations = BlockActivations()
    overrides = BlockOverrides(positions=state.positions(1, scored=is_last), limits_attention=is_last)
    output = run_block(
        block, state.branches[0], state.inputs.arguments(layer, 1), overrides, traits, activations=activations
    )
    if check:
        _check_own_activations(layer, block, state, overrides, traits, activations, output)
    state.branches[0] = state.at_scored(output) if is_last else output
    return activations


def _check_own_activations(
    layer: int,
    block: Block,
    state: ModelState,
    overrides: BlockOverrides,
    traits: MlpTraits,
    activations: BlockActivations,
    output: Tensor,
) -> None:
    """Check that a block, given its own activations, returns its own output; every replacement relies on it.

    Raises:
        InputError: The output differs.
    """
    attn_out, mlp_out = (
        None if states is None else states.clone() for states in (activations.attn_out, activations.mlp_out)
    )
    overrides = replace(
        activations.extras(),
        positions=overrides.positions,
        limits_attention=overrides.limits_attention,
        attn_out=attn_out,
        mlp_out=mlp_out,
    )
    again = run_block(block, state.branches[0], state.inputs.arguments(layer, 1), overrides, traits)
    if not torch.equal(again, output):
        gap = float((again - output).abs().max())
        raise InputError(
            f"`engine` must be 'reference' for {state.model.name}, got 'wavefront': a block that is given its own "
            f"activations changes its output by {gap:.2g}"
        )
