"""Run every intervention in one pass over the layers of both models.

In each layer the base's block is run once, and its activations at the sites are kept. Then the target's block is run
on the target's residual stream and on every branch that forked from it (see `schedule`), in chunks of a size that the
machine multiplies fast. What a replacement makes unnecessary is not computed (see `overrides`). Activations of only one
layer are kept at a time.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.engine import Advance, Sweep, targets_of
from dissect.engine.blocks import BlockInputs, block_inputs, logits_of
from dissect.engine.chunk import Chunk
from dissect.engine.layers import Layers
from dissect.engine.overrides import (
    BlockActivations,
    BlockOverrides,
    MlpTraits,
    find_mlp_traits,
    find_unused_modules,
    run_block,
    scatter,
)
from dissect.engine.schedule import WHOLE, Schedule, Step, make_schedule
from dissect.interventions.donors import Donor
from dissect.interventions.intervention import NO_SITES, Intervention
from dissect.models.anatomy import Block
from dissect.models.model import Model
from dissect.models.parameter_swap import restored_block, restored_model
from dissect.prompts.prompts import Batch
from unlearning.common.errors import InputError


@dataclass(eq=False)
class _ModelState:
    """One model's branches for one batch.

    Attributes:
        model: The model.
        batch: The batch, on the model's device.
        inputs: What the model passes to its blocks.
        branches: Hidden states of every branch, [batch, position, d_model]; [1, scored, d_model] where no later
            attention reads the other positions.
        scored: Flat indices of the scored positions.
        tokens: Flat indices of the positions that hold a token; None if the batch has no padding.
    """

    model: Model
    batch: Batch
    inputs: BlockInputs
    branches: dict[int, Tensor]
    scored: Int[Tensor, " scored"]
    tokens: Int[Tensor, " tokens"] | None
    _repeated: dict[tuple[int, bool], Tensor | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows and of padded positions."""
        return tuple(self.batch.input_ids.shape)

    def positions(self, copies: int, *, scored: bool) -> Int[Tensor, " kept"] | None:
        """Return the flat positions where the MLP is needed in several copies of the batch, None for all positions."""
        key = (copies, scored)
        if key not in self._repeated:
            one, size = self.scored if scored else self.tokens, self.batch.input_ids.numel()
            self._repeated[key] = None if one is None else torch.cat([one + size * copy for copy in range(copies)])
        return self._repeated[key]

    def at_scored(self, states: Float[Tensor, "batch position width"]) -> Float[Tensor, "1 scored width"]:
        """Return states at the scored positions."""
        return states.flatten(0, 1)[self.scored.to(states.device)][None]


def _model_state(model: Model, batch: Batch) -> _ModelState:
    batch = batch.to(model.device)
    inputs = block_inputs(model.hf, model.anatomy, batch)
    return _ModelState(
        model=model,
        batch=batch,
        inputs=inputs,
        branches={0: inputs.hidden},
        scored=batch.rows * batch.input_ids.shape[1] + batch.columns,
        tokens=None if batch.is_dense else batch.attention_mask.flatten().nonzero()[:, 0],
    )


@dataclass(frozen=True, eq=False)
class _BatchState:
    """States of all models for one batch; `donor` is None if the base gives its own activations."""

    base: _ModelState
    donor: _ModelState | None
    targets: list[_ModelState]


def _needs_own_pass(donor: Donor, base: Model) -> bool:
    return donor.model is not base or bool(donor.tokens)


def _target_state(model: Model, batch: Batch, schedule: Schedule, donor: Donor) -> _ModelState:
    """Return a target's state, with the branches that differ before the first layer."""
    state = _model_state(model, batch)
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
    schedule = make_schedule(interventions, base.n_layers)
    with layers.embedding():
        batch_states = [
            _BatchState(
                base=_model_state(base, batch),
                donor=_model_state(donor.model, donor.batch(batch)) if _needs_own_pass(donor, base) else None,
                targets=[_target_state(target, batch, schedule, donor) for target in targets],
            )
            for batch in batches
        ]
        one_row = _model_state(base, batches[0].pieces(1)[0].trimmed())
    traits: MlpTraits | None = None
    with closing(layers.blocks()) as all_blocks:  # closed at once: a thread may be reading for it
        for layer, blocks in enumerate(all_blocks):
            donor_block, *target_blocks = blocks[-len(targets) - 1 :]  # the base's block if the base is the donor
            traits = traits or _mlp_traits(blocks[0], one_row)
            for states in batch_states:
                activations = _run_source(layer, blocks[0], states.base, schedule, traits)
                if states.donor is not None:
                    activations = _run_source(layer, donor_block, states.donor, schedule, traits)
                given = _DonorActivations(donor, states.donor or states.base, donor_block, layer, activations)
                for block, state in zip(target_blocks, states.targets, strict=True):
                    _LayerRun(layer, block, state, given, traits).run(schedule.layers[layer], chunk)
            advance(1 / schedule.n_layers)
    with layers.head():
        for states in batch_states:
            logits = next(_logits(states.base, [(0, NO_SITES)], donor, chunk))
            yield [
                Sweep(
                    logits.to(state.model.device),
                    next(_logits(state, [(0, NO_SITES)], donor, chunk)),
                    _logits(state, schedule.ends, donor, chunk),
                )
                for state in states.targets
            ]


def _mlp_traits(block: Block, one_row: _ModelState) -> MlpTraits:
    hidden, arguments = one_row.inputs.hidden, one_row.inputs.arguments(0, 1)
    traits = find_mlp_traits(block, hidden)
    return replace(traits, unused_modules=find_unused_modules(block, hidden, arguments, traits))


@torch.inference_mode()
def _logits(
    state: _ModelState, ends: Sequence[tuple[int, frozenset[str]]], donor: Donor, chunk: Chunk
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
    layer: int, block: Block, state: _ModelState, schedule: Schedule, traits: MlpTraits
) -> BlockActivations:
    """Run one layer of the base or the donor, and return its activations."""
    is_last = layer == schedule.n_layers - 1
    activations = BlockActivations()
    overrides = BlockOverrides(positions=state.positions(1, scored=is_last), limits_attention=is_last)
    output = run_block(
        block, state.branches[0], state.inputs.arguments(layer, 1), overrides, traits, activations=activations
    )
    if layer == 0:
        _check_own_activations(block, state, overrides, traits, activations, output)
    state.branches[0] = state.at_scored(output) if is_last else output
    return activations


def _check_own_activations(
    block: Block,
    state: _ModelState,
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
        mlp_out=None if block.mlp is None else mlp_out,
        down_proj_out=mlp_out if block.mlp is None else None,
    )
    again = run_block(block, state.branches[0], state.inputs.arguments(0, 1), overrides, traits)
    if not torch.equal(again, output):
        gap = float((again - output).abs().max())
        raise InputError(
            f"`engine` must be 'reference' for {state.model.name}, got 'wavefront': a block that is given its own "
            f"activations changes its output by {gap:.2g}"
        )


@dataclass(eq=False)
class _DonorActivations:
    """The donor's activations in one layer for one batch."""

    donor: Donor
    state: _ModelState
    block: Block
    layer: int
    activations: BlockActivations
    _known: dict[str, Tensor] = field(default_factory=dict)

    def at(self, site: str) -> Float[Tensor, "batch position width"]:
        """Return what replaces a target's activation; coefficients only where the MLP was run."""
        if site not in self._known:
            seen, state = self.activations, self.state
            own = {
                "attn_out": seen.attn_out,
                "mlp_coef": seen.mlp_coef,
                "mlp_out": seen.mlp_out,
                "resid_post": state.branches[0],
            }[site]
            assert own is not None
            is_last = self.layer == state.model.n_layers - 1
            positions = None if own.shape[:2] == state.shape else state.positions(1, scored=is_last)
            self._known[site] = self.donor.replacement(
                own, state.batch, site=site, layer=self.layer, positions=positions
            )
        return self._known[site]


@dataclass(eq=False)
class _LayerRun:
    """One layer of one target for one batch."""

    layer: int
    block: Block
    state: _ModelState
    given: _DonorActivations
    traits: MlpTraits
    _shared: dict[int, BlockActivations] = field(default_factory=dict)
    _restored: dict[frozenset[str], Block] = field(default_factory=dict)
    _down_proj_outputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of this layer; the layers of one model may be on several GPUs."""
        return next(self.block.whole.parameters()).device

    def run(self, steps: Sequence[Step], chunk: Chunk) -> None:
        """Run every branch through the layer; branches with the same overrides go in chunks.

        Args:
            steps: Steps of the layer; steps that share their attention stand first.
            chunk: Number of tokens that go through the block at once.
        """
        branches: dict[int, Tensor] = {}
        for group in _alike(steps):
            first = group[0]
            if first.sites & WHOLE:
                output = self.given.at("resid_post").to(self.device)
                narrow = not first.needs_all_out and output.shape[:2] == self.state.shape
                output = self.state.at_scored(output) if narrow else output
                branches |= {step.branch: output for step in group}
                continue
            scored_only = not first.needs_all_in
            n_tokens = len(self.state.scored) if scored_only else self.state.batch.input_ids.numel()
            for outputs in chunk.run(group, n_tokens, partial(self._run, scored_only=scored_only)):
                branches |= outputs
        self.state.branches = branches

    def _run(self, steps: Sequence[Step], *, scored_only: bool) -> dict[int, Tensor]:
        """Return the output of every step's branch, given steps that are alike."""
        first, copies, state = steps[0], len(steps), self.state
        entering = [state.branches[step.parent] for step in steps]
        if scored_only:
            entering = [states if self._is_narrow(states) else state.at_scored(states) for states in entering]
        hidden = torch.cat(entering) if copies > 1 else entering[0]
        activations = BlockActivations() if first.shares_attention else None
        output = run_block(
            self._block(first),
            hidden,
            state.inputs.arguments(self.layer, 1 if scored_only else copies),
            self._overrides(first, copies, scored_only=scored_only),
            self.traits,
            activations=activations,
        )
        if activations is not None:
            self._shared[first.parent] = activations
        outputs = output.split(1 if scored_only else state.shape[0])
        if not scored_only and not first.needs_all_out:
            outputs = tuple(state.at_scored(one) for one in outputs)
        return {step.branch: one for step, one in zip(steps, outputs, strict=True)}

    def _is_narrow(self, states: Tensor) -> bool:
        """Return True if states hold the scored positions only."""
        return states.shape[:2] == (1, len(self.state.scored)) and states.shape[:2] != self.state.shape

    def _overrides(self, step: Step, copies: int, *, scored_only: bool) -> BlockOverrides:
        def copied(states: Tensor) -> Tensor:
            states = self.state.at_scored(states) if scored_only else states
            return states.repeat(copies, 1, 1)  # a single copy too: the block may write into it

        narrow = not step.needs_all_out
        overrides = replace(
            self.given.activations.extras(),
            positions=None if scored_only else self.state.positions(copies, scored=narrow),
            limits_attention=narrow,
        )
        if not step.computes_attn:
            attn_out = self.given.at("attn_out") if "attn_out" in step.sites else self._shared[step.parent].attn_out
            assert attn_out is not None
            overrides = replace(overrides, attn_out=copied(attn_out.to(self.device)))
        if "mlp_out" in step.sites:
            return self._with_mlp(overrides, copied(self.given.at("mlp_out").to(self.device)), is_mlp_out=True)
        if "mlp_coef" in step.sites:
            output = self._down_proj_output(step, self.given.at("mlp_coef"), self.given.state)
            return self._with_mlp(overrides, copied(output), is_mlp_out=False)
        if step.restores_down_proj_only:
            coefficients = self._shared[step.parent].mlp_coef
            assert coefficients is not None
            output = self._down_proj_output(step, coefficients, self.state)
            return self._with_mlp(overrides, copied(output), is_mlp_out=False)
        return overrides

    def _block(self, step: Step) -> Block:
        """Return the target's block, with the donor's weights at the step's weight sites."""
        if not step.weights:
            return self.block
        if step.weights not in self._restored:
            self._restored[step.weights] = restored_block(
                self.block, self.given.block, step.weights, self.layer, self.state.model
            )
        return self._restored[step.weights]

    def _with_mlp(self, overrides: BlockOverrides, output: Tensor, *, is_mlp_out: bool) -> BlockOverrides:
        """Return overrides with the MLP's output, or the down projection's where the MLP changes that output."""
        if self.block.mlp is not None and (is_mlp_out or self.traits.mlp_ends_in_down_proj):
            return replace(overrides, mlp_out=output)
        return replace(overrides, down_proj_out=output)

    def _down_proj_output(
        self, step: Step, coefficients: Float[Tensor, "batch position d_mlp"], state: _ModelState
    ) -> Float[Tensor, "batch position d_model"]:
        """Return the down projection's output for given coefficients, computed once for all branches that share it."""
        down_proj = self._block(step).down_proj
        assert down_proj is not None
        key = (id(coefficients), *map(id, down_proj.parameters()))
        if key not in self._down_proj_outputs:
            output = down_proj(coefficients.to(self.device))
            if coefficients.shape[:2] != self.state.shape:
                positions = state.positions(1, scored=self.layer == state.model.n_layers - 1)
                assert positions is not None
                output = scatter(output[0], positions, self.state.shape)
            self._down_proj_outputs[key] = output
        return self._down_proj_outputs[key]


def _alike(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in groups that can go through the block together, in the order of their first steps."""
    groups: dict[object, list[Step]] = {}
    for step in steps:
        uses_sibling = step.reuses_attention and "attn_out" not in step.sites
        parent = step.parent if step.shares_attention or uses_sibling else None
        key = (parent, step.shares_attention, uses_sibling, step.sites, step.needs_all_in, step.needs_all_out)
        groups.setdefault(key, []).append(step)
    return list(groups.values())
