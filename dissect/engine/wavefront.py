"""Every intervention in one pass over the layers of both models.

At each layer the base's block is run once and its activations at the sites are taken; then the target's block is
run on its own stream and on every stream that has forked from it (see `schedule`), in chunks of a size that the
machine multiplies fast. What a replacement makes pointless is not computed (see `treatment`). No activation of
another layer is kept.
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
from dissect.engine.blocks import Entry, enter, logits_of
from dissect.engine.chunk import Chunk
from dissect.engine.layers import Layers
from dissect.engine.schedule import WHOLE, Schedule, Step, make_schedule
from dissect.engine.treatment import Habits, Seen, Treatment, find_habits, find_idle, run_block, spread
from dissect.interventions.donors import Donor
from dissect.interventions.intervention import NOWHERE, Intervention
from dissect.models.anatomy import Block
from dissect.models.model import Model
from dissect.models.parameter_swap import restored_block, restored_model
from dissect.prompts.prompts import Batch
from unlearning.common.errors import InputError


@dataclass(eq=False)
class _Lane:
    """One model's streams of one batch.

    A stream whose positions no later attention reads is kept at the scored ones only, as [1, scored, d_model].
    """

    model: Model
    batch: Batch
    entry: Entry
    streams: dict[int, Tensor]
    scored: Int[Tensor, " scored"]
    tokens: Int[Tensor, " tokens"] | None
    _repeated: dict[tuple[int, bool], Tensor | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and padded positions."""
        return tuple(self.batch.input_ids.shape)

    def positions(self, copies: int, *, scored: bool) -> Int[Tensor, " kept"] | None:
        """Flat positions where the MLP is needed in so many copies of the batch, None for all of them."""
        key = (copies, scored)
        if key not in self._repeated:
            one, size = self.scored if scored else self.tokens, self.batch.input_ids.numel()
            self._repeated[key] = None if one is None else torch.cat([one + size * copy for copy in range(copies)])
        return self._repeated[key]

    def at_scored(self, states: Float[Tensor, "batch position width"]) -> Float[Tensor, "1 scored width"]:
        """The scored positions of full states."""
        return states.flatten(0, 1)[self.scored.to(states.device)][None]


def _lane(model: Model, batch: Batch) -> _Lane:
    batch = batch.to(model.device)
    entry = enter(model.hf, model.anatomy, batch)
    return _Lane(
        model=model,
        batch=batch,
        entry=entry,
        streams={0: entry.hidden},
        scored=batch.rows * batch.input_ids.shape[1] + batch.columns,
        tokens=None if batch.is_dense else batch.attention_mask.flatten().nonzero()[:, 0],
    )


@dataclass(frozen=True, eq=False)
class _Lanes:
    """One batch through all models; the donor's lane is the base's where it gives its own activations."""

    base: _Lane
    donor: _Lane | None
    targets: list[_Lane]


def _is_apart(donor: Donor, base: Model) -> bool:
    return donor.model is not base or bool(donor.tokens)


def _forked_lane(model: Model, batch: Batch, schedule: Schedule, donor: Donor) -> _Lane:
    """A target's lane, with the streams that differ before the first layer."""
    lane = _lane(model, batch)
    for stream, restored in schedule.starts.items():
        if restored:
            hf = restored_model(model, donor.model, restored, "before")
            lane.streams[stream] = enter(hf, model.anatomy, lane.batch).hidden
    return lane


def sweep(
    layers: Layers,
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    donor: Donor,
    chunk: Chunk,
    advance: Advance,
) -> Iterator[list[Sweep]]:
    """Run all interventions in one pass over the layers, with all batches together.

    Batches much longer than a chunk are cut by rows, evenly; their padding stays, so that no position shifts.
    """
    pieces = [batch.pieces(_rows_of_piece(batch, chunk)) for batch in batches]
    walked = walk(layers, [piece for several in pieces for piece in several], interventions, donor, chunk, advance)
    with closing(walked):
        for several in pieces:
            by_target = zip(*[next(walked) for _ in several], strict=True)
            yield [_joined(parts) for parts in by_target]


def _rows_of_piece(batch: Batch, chunk: Chunk) -> int:
    rows, positions = batch.input_ids.shape
    return math.ceil(rows / max(1, round(rows * positions / chunk.tokens)))


def _joined(parts: Sequence[Sweep]) -> Sweep:
    """The sweep of a batch from those of its pieces."""
    if len(parts) == 1:
        return parts[0]
    return Sweep(
        torch.cat([part.base for part in parts]),
        torch.cat([part.target for part in parts]),
        (torch.cat(logits) for logits in zip(*[part.intervened for part in parts], strict=True)),
    )


@torch.inference_mode()
def walk(
    layers: Layers,
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    donor: Donor,
    chunk: Chunk,
    advance: Advance,
) -> Generator[list[Sweep]]:
    """Walk the layers once with all batches and interventions together.

    Args:
        layers: the models, base first, then the donor's where it is another one, then the targets.
        batches: padded prompts; small ones, since the chunks are made of whole batches.
        interventions: what to do.
        donor: where activations and weights come from.
        chunk: how much goes through a block at once.
        advance: told after each layer.

    Yields:
        For each batch, one sweep of each target.
    """
    base, targets = layers.models[0], targets_of(layers.models, donor)
    schedule = make_schedule(interventions, base.n_layers)
    with layers.embedding():
        lanes = [
            _Lanes(
                base=_lane(base, batch),
                donor=_lane(donor.model, donor.batch(batch)) if _is_apart(donor, base) else None,
                targets=[_forked_lane(target, batch, schedule, donor) for target in targets],
            )
            for batch in batches
        ]
        row = _lane(base, batches[0].pieces(1)[0].trimmed())
    habits: Habits | None = None
    with closing(layers.blocks()) as all_blocks:  # closed now and not some time, since a thread may read for it
        for number, blocks in enumerate(all_blocks):
            donor_block, *target_blocks = blocks[-len(targets) - 1 :]  # the base's own where it is the donor
            habits = habits or _habits(blocks[0], row)
            for several in lanes:
                seen = _run_source(number, blocks[0], several.base, schedule, habits)
                if several.donor is not None:
                    seen = _run_source(number, donor_block, several.donor, schedule, habits)
                given = _Given(donor, several.donor or several.base, donor_block, number, seen)
                for block, lane in zip(target_blocks, several.targets, strict=True):
                    _Crossing(number, block, lane, given, habits).run(schedule.layers[number], chunk)
            advance(1 / schedule.n_layers)
    with layers.head():
        for several in lanes:
            logits = next(_logits(several.base, [(0, NOWHERE)], donor, chunk))
            yield [
                Sweep(
                    logits.to(lane.model.device),
                    next(_logits(lane, [(0, NOWHERE)], donor, chunk)),
                    _logits(lane, schedule.ends, donor, chunk),
                )
                for lane in several.targets
            ]


def _habits(block: Block, row: _Lane) -> Habits:
    habits = find_habits(block, row.entry.hidden)
    return replace(habits, idle=find_idle(block, row.entry.hidden, row.entry.call(0, 1), habits))


@torch.inference_mode()
def _logits(
    lane: _Lane, ends: Sequence[tuple[int, frozenset[str]]], donor: Donor, chunk: Chunk
) -> Iterator[Float[Tensor, "scored vocab"]]:
    """The logits of finished streams, several that go through the same head at a time."""
    each = len(lane.scored)
    for restored, group in groupby(ends, key=lambda end: end[1]):
        model = lane.model
        hf = restored_model(model, donor.model, restored, "after") if restored else model.hf
        streams = [stream for stream, _ in group]
        several = chunk.holds(each)
        for first in range(0, len(streams), several):
            some = streams[first : first + several]
            states = torch.cat([lane.streams[stream][0] for stream in some])
            logits = logits_of(hf, model.anatomy, states, as_tuple=lane.entry.as_tuple)
            yield from logits.to(model.device).split(each)


def _run_source(number: int, block: Block, lane: _Lane, schedule: Schedule, habits: Habits) -> Seen:
    """Move the stream of the base or the donor through a layer; returns the activations on the way."""
    last = number == schedule.n_layers - 1
    seen = Seen()
    treatment = Treatment(positions=lane.positions(1, scored=last), last=last)
    output = run_block(block, lane.streams[0], lane.entry.call(number, 1), treatment, habits, seen=seen)
    if number == 0:
        _check_own_activations(block, lane, treatment, habits, seen, output)
    lane.streams[0] = lane.at_scored(output) if last else output
    return seen


def _check_own_activations(
    block: Block, lane: _Lane, treatment: Treatment, habits: Habits, seen: Seen, output: Tensor
) -> None:
    """Prove that a block given its own activations does what it does by itself, as replacing relies on.

    Raises:
        InputError: it does not.
    """
    attn, mlp = (None if states is None else states.clone() for states in (seen.attn, seen.mlp))
    extras = replace(treatment, attn_extras=seen.attn_extras, mlp_extras=seen.mlp_extras, is_flat=seen.is_flat)
    given = replace(extras, attn=attn, down_output=mlp) if block.mlp is None else replace(extras, attn=attn, mlp=mlp)
    again = run_block(block, lane.streams[0], lane.entry.call(0, 1), given, habits)
    if not torch.equal(again, output):
        gap = float((again - output).abs().max())
        raise InputError(
            f"{lane.model.name}: a block given its own activations changes what it computes by {gap:.2g}; its sites "
            "cannot be trusted by the wavefront engine, use --engine reference"
        )


@dataclass(eq=False)
class _Given:
    """What the donor gives at one layer, for one batch."""

    donor: Donor
    lane: _Lane
    block: Block
    number: int
    seen: Seen
    _known: dict[str, Tensor] = field(default_factory=dict)

    def at(self, site: str) -> Float[Tensor, "batch position width"]:
        """What stands in for a target's activation; the coefficients only where the MLP was run."""
        if site not in self._known:
            seen, lane = self.seen, self.lane
            states = {"attn_out": seen.attn, "mlp_coef": seen.coef, "mlp_out": seen.mlp, "resid_post": lane.streams[0]}
            here = states[site]
            assert here is not None
            last = self.number == lane.model.n_layers - 1
            positions = None if here.shape[:2] == lane.shape else lane.positions(1, scored=last)
            self._known[site] = self.donor.given(here, lane.batch, site=site, layer=self.number, positions=positions)
        return self._known[site]


@dataclass(eq=False)
class _Crossing:
    """One layer of one target, for one batch."""

    number: int
    block: Block
    lane: _Lane
    given: _Given
    habits: Habits
    _lent: dict[int, Seen] = field(default_factory=dict)
    _restored: dict[frozenset[str], Block] = field(default_factory=dict)
    _written: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this layer computes: the layers of one model may be spread over several GPUs."""
        return next(self.block.whole.parameters()).device

    def run(self, steps: Sequence[Step], chunk: Chunk) -> None:
        """Move every stream through the layer, those with the same treatment in chunks."""
        arrived: dict[int, Tensor] = {}
        groups: dict[object, list[Step]] = {}
        for step in steps:
            uses_sibling = step.borrows and "attn_out" not in step.sites
            alone = step.parent if step.lends or uses_sibling else None
            key = (alone, step.lends, uses_sibling, step.sites, step.needs_all_in, step.needs_all_out)
            groups.setdefault(key, []).append(step)
        for group in groups.values():
            first = group[0]
            if first.sites & WHOLE:
                output = self.given.at("resid_post").to(self.device)
                narrow = not first.needs_all_out and output.shape[:2] == self.lane.shape
                output = self.lane.at_scored(output) if narrow else output
                arrived |= {step.stream: output for step in group}
                continue
            packed = not first.needs_all_in
            each = len(self.lane.scored) if packed else self.lane.batch.input_ids.numel()
            for outputs in chunk.run(group, each, partial(self._run, packed=packed)):
                arrived |= outputs
        self.lane.streams = arrived

    def _run(self, steps: Sequence[Step], *, packed: bool) -> dict[int, Tensor]:
        first, copies, lane = steps[0], len(steps), self.lane
        states = [lane.streams[step.parent] for step in steps]
        if packed:
            states = [state if self._is_packed(state) else lane.at_scored(state) for state in states]
        hidden = torch.cat(states) if copies > 1 else states[0]
        seen = Seen() if first.lends else None
        output = run_block(
            self._block(first),
            hidden,
            lane.entry.call(self.number, 1 if packed else copies),
            self._treatment(first, copies, packed=packed),
            self.habits,
            seen=seen,
        )
        if seen is not None:
            self._lent[first.parent] = seen
        outputs = output.split(1 if packed else lane.shape[0])
        if not packed and not first.needs_all_out:
            outputs = tuple(lane.at_scored(one) for one in outputs)
        return {step.stream: one for step, one in zip(steps, outputs, strict=True)}

    def _is_packed(self, state: Tensor) -> bool:
        return state.shape[:2] == (1, len(self.lane.scored)) and state.shape[:2] != self.lane.shape

    def _treatment(self, step: Step, copies: int, *, packed: bool) -> Treatment:
        def copied(given: Tensor) -> Tensor:
            given = self.lane.at_scored(given) if packed else given
            return given.repeat(copies, 1, 1)  # also a single one: a block may add to it in place

        narrow = not step.needs_all_out
        treatment = Treatment(
            positions=None if packed else self.lane.positions(copies, scored=narrow),
            last=narrow,
            attn_extras=self.given.seen.attn_extras,
            mlp_extras=self.given.seen.mlp_extras,
            is_flat=self.given.seen.is_flat,
        )
        if not step.computes_attn:
            attn = self.given.at("attn_out") if "attn_out" in step.sites else self._lent[step.parent].attn
            assert attn is not None
            treatment = replace(treatment, attn=copied(attn.to(self.device)))
        if "mlp_out" in step.sites:
            return self._with_mlp(treatment, copied(self.given.at("mlp_out").to(self.device)), whole=True)
        if "mlp_coef" in step.sites:
            written = self._written_by(step, self.given.at("mlp_coef"), self.given.lane)
            return self._with_mlp(treatment, copied(written), whole=False)
        if step.restores_borrowed:
            coefficients = self._lent[step.parent].coef
            assert coefficients is not None
            return self._with_mlp(treatment, copied(self._written_by(step, coefficients, self.lane)), whole=False)
        return treatment

    def _block(self, step: Step) -> Block:
        """The block that a step runs: the target's own, with the donor's weights where some are restored."""
        if not step.weights:
            return self.block
        if step.weights not in self._restored:
            self._restored[step.weights] = restored_block(
                self.block, self.given.block, step.weights, self.number, self.lane.model
            )
        return self._restored[step.weights]

    def _with_mlp(self, treatment: Treatment, output: Tensor, *, whole: bool) -> Treatment:
        """Give the MLP's output, or only its down projection's where something happens to that."""
        if self.block.mlp is not None and (whole or self.habits.mlp_ends_in_down_proj):
            return replace(treatment, mlp=output)
        return replace(treatment, down_output=output)

    def _written_by(
        self, step: Step, coefficients: Float[Tensor, "batch position d_mlp"], lane: _Lane
    ) -> Float[Tensor, "batch position d_model"]:
        """What the down projection writes from given coefficients: one product for every stream that has them."""
        down_proj = self._block(step).down_proj
        assert down_proj is not None
        key = (id(coefficients), *map(id, down_proj.parameters()))
        if key not in self._written:
            written = down_proj(coefficients.to(self.device))
            if coefficients.shape[:2] != self.lane.shape:
                positions = lane.positions(1, scored=self.number == lane.model.n_layers - 1)
                assert positions is not None
                written = spread(written[0], positions, self.lane.shape)
            self._written[key] = written
        return self._written[key]
