"""Run one layer of one target on all branches of a batch (see `schedule` for the branches)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.engine.blocks import BlockInputs, block_inputs
from dissect.engine.chunk import Chunk
from dissect.engine.overrides import BlockActivations, BlockOverrides, MlpTraits, run_block, scatter
from dissect.engine.schedule import WHOLE, Step
from dissect.interventions.donors import Donor
from dissect.models.anatomy import Block
from dissect.models.model import Model
from dissect.models.parameter_swap import restored_block
from dissect.prompts.prompts import Batch


@dataclass(eq=False)
class ModelState:
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


def model_state(model: Model, batch: Batch) -> ModelState:
    """Return a model's state before the first layer, with branch 0 only."""
    batch = batch.to(model.device)
    inputs = block_inputs(model.hf, model.anatomy, batch)
    return ModelState(
        model=model,
        batch=batch,
        inputs=inputs,
        branches={0: inputs.hidden},
        scored=batch.rows * batch.input_ids.shape[1] + batch.columns,
        tokens=None if batch.is_dense else batch.attention_mask.flatten().nonzero()[:, 0],
    )


@dataclass(eq=False)
class DonorActivations:
    """The donor's activations in one layer for one batch."""

    donor: Donor
    state: ModelState
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
class LayerRun:
    """One layer of one target for one batch."""

    layer: int
    block: Block
    state: ModelState
    given: DonorActivations
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
        if step.restores_down_proj_only and self.block.down_proj is not None:
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
        if is_mlp_out or self.traits.mlp_ends_in_down_proj:
            return replace(overrides, mlp_out=output)
        return replace(overrides, down_proj_out=output)

    def _down_proj_output(
        self, step: Step, coefficients: Float[Tensor, "batch position d_mlp"], state: ModelState
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
