"""Split a sweep into passes that fit into memory, shares for processes, and chunks that run fast."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dissect.engine.blocks import block_inputs
from dissect.engine.costs import ModelCosts, costs_of, pass_bytes, pass_flops
from dissect.engine.overrides import BlockOverrides, MlpTraits, run_block
from dissect.engine.schedule import Schedule, make_schedule
from dissect.interventions.intervention import Intervention
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch
from dissect.runtime.memory import Budget
from dissect.runtime.sizes import in_bytes
from unlearning.common.errors import InputError

CALIBRATION_S = 1.0
"""Longest time, in seconds, that a chunk may be expected to take to be tried."""
TRIAL_S = 0.1
"""Time, in seconds, after which a size of chunk has been timed well enough."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over the layers.

    Attributes:
        batches: Batches that go through the layers in this pass.
        interventions: Indices of the interventions that are run in this pass.
        flops: Floating-point operations of the pass.
    """

    batches: tuple[Batch, ...]
    interventions: tuple[int, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All passes of a sweep, with their cost.

    Attributes:
        passes: Passes in the order in which they are run.
        chunk_tokens: Number of tokens that go through a block at once.
        max_branches: Largest number of branches in memory at once.
        flops: Floating-point operations of all passes.
        naive_flops: Floating-point operations of one full forward pass per intervention, with logits at every position.
        bytes: Estimate of the largest memory of a pass, in addition to the weights.
        budget: Memory that the process may use.
    """

    passes: tuple[Pass, ...]
    chunk_tokens: int
    max_branches: int
    flops: int
    naive_flops: int
    bytes: int
    budget: Budget

    def record(self) -> dict[str, Any]:
        """Return the plan's entries in `run.json`."""
        return {
            "passes": len(self.passes),
            "examples_per_batch": max(len(batch.examples) for one in self.passes for batch in one.batches),
            "interventions_per_pass": max(len(one.interventions) for one in self.passes),
            "most_copies": self.max_branches,
            "chunk_tokens": self.chunk_tokens,
            "flops": self.flops,
            "naive_flops": self.naive_flops,
            "bytes_beside_weights": self.bytes,
            "bytes_held": self.budget.held,
            "budget_bytes": self.budget.allowed,
        }


@dataclass(frozen=True, eq=False)
class _SweepCosts:
    """Costs of a sweep's interventions in any grouping."""

    model: ModelCosts
    interventions: Sequence[Intervention]
    n_targets: int
    n_sources: int
    itemsize: int
    _schedules: dict[tuple[int, ...], Schedule] = field(default_factory=dict)

    def schedule(self, group: tuple[int, ...]) -> Schedule:
        """Return the schedule of a group of interventions, given as indices."""
        if group not in self._schedules:
            interventions = [self.interventions[index] for index in group]
            self._schedules[group] = make_schedule(interventions, self.model.n_layers)
        return self._schedules[group]

    def bytes(self, batches: Sequence[Batch], groups: Sequence[tuple[int, ...]], chunk_tokens: int) -> int:
        """Return the bytes of a pass with these batches under the most expensive group."""
        return max(
            pass_bytes(
                self.schedule(group),
                self.model,
                batches,
                self.n_targets,
                chunk=chunk_tokens,
                itemsize=self.itemsize,
                n_sources=self.n_sources,
            )
            for group in groups
        )

    def one_pass(self, batches: Sequence[Batch], group: tuple[int, ...]) -> Pass:
        """Return a pass with its operations."""
        schedule = self.schedule(group)
        flops = sum(
            pass_flops(schedule, self.model, batch, self.n_targets, n_sources=self.n_sources) for batch in batches
        )
        return Pass(tuple(batches), group, flops)


def make_plan(
    models: Sequence[Model],
    interventions: Sequence[Intervention],
    *,
    batches: Sequence[Batch],
    budget: Budget,
    chunk_tokens: int | None = None,
    processes: int = 1,
    n_sources: int = 1,
) -> Plan:
    """Split a sweep so that every pass fits the budget and every process has a share.

    Examples are split before interventions, because every group of interventions runs the base and the target again.
    Streamed models go through as few passes as the budget allows, because every pass reads their weights again.

    Args:
        models: Base first, then the targets.
        interventions: Interventions on each target.
        batches: All prompts, in batches as large as they may become.
        budget: Memory that may be used.
        chunk_tokens: Number of tokens that go through a block at once; None to measure the fastest.
        processes: Number of processes that share the work.
        n_sources: 2 if the donor needs its own forward pass, else 1.

    Returns:
        The passes and their cost.

    Raises:
        InputError: One example under one intervention does not fit the budget (the message says what it needs).
    """
    base = models[0]
    costs = _SweepCosts(
        model=costs_of(base),
        interventions=interventions,
        n_targets=len(models) - 1,
        n_sources=n_sources,
        itemsize=next(base.hf.parameters()).element_size(),
    )
    chunk_tokens = chunk_tokens or measure_chunk(models[-1], batches[0], costs.model)
    pieces, groups, chunk_tokens = _split_to_fit(costs, batches, budget, chunk_tokens, processes)
    together = [[piece] for piece in pieces]
    if base.streamed is not None:
        together = _merge_batches(
            pieces, lambda several: costs.bytes(several, groups, chunk_tokens) <= budget.left, processes
        )
    passes = [costs.one_pass(several, group) for several in together for group in groups]
    forwards = n_sources + costs.n_targets * (1 + len(interventions))
    return Plan(
        passes=tuple(passes),
        chunk_tokens=chunk_tokens,
        max_branches=max(costs.schedule(group).max_branches for group in groups),
        flops=sum(one.flops for one in passes),
        naive_flops=sum(forwards * costs.model.forward(*piece.input_ids.shape) for piece in pieces),
        bytes=max(costs.bytes(one.batches, groups, chunk_tokens) for one in passes),
        budget=budget,
    )


def _split_to_fit(
    costs: _SweepCosts, batches: Sequence[Batch], budget: Budget, chunk_tokens: int, processes: int
) -> tuple[list[Batch], list[tuple[int, ...]], int]:
    """Split batches, then chunks, then interventions until one batch under one group fits the budget.

    Returns:
        The batches, the groups of interventions as indices, and the chunk in tokens.
    """
    everything = tuple(range(len(costs.interventions)))
    n_examples = sum(len(batch.examples) for batch in batches)
    rows = max(len(batch.examples) for batch in batches)
    rows = min(rows, max(1, -(-n_examples // processes)))
    groups = [everything]
    while True:
        pieces = [piece.trimmed() for batch in batches for piece in batch.pieces(rows)]
        longest = max(piece.input_ids.numel() for piece in pieces)
        needed = max(costs.bytes([piece], groups, chunk_tokens) for piece in pieces)
        if needed <= budget.left:
            break
        if rows > 1:
            rows //= 2
        elif chunk_tokens > longest:
            chunk_tokens = max(longest, chunk_tokens // 2)
        elif len(groups) < len(everything):
            groups = _split_round_robin(everything, 2 * len(groups))
        else:
            raise InputError(
                f"`max_memory` must be at least {in_bytes(budget.held + needed, up=True)}, got "
                f"{in_bytes(budget.allowed)}: the program and the weights take {in_bytes(budget.held)}, one example "
                f"under one intervention takes {in_bytes(needed)}"
            )
    if len(pieces) * len(groups) < processes:
        groups = _split_round_robin(everything, min(len(everything), -(-processes // len(pieces))))
    return pieces, groups, chunk_tokens


def combined_plan(plans: Sequence[Plan]) -> Plan:
    """Combine plans that are run one after the other into one plan, for display and `run.json`."""
    return Plan(
        passes=tuple(one for plan in plans for one in plan.passes),
        chunk_tokens=min(plan.chunk_tokens for plan in plans),
        max_branches=max(plan.max_branches for plan in plans),
        flops=sum(plan.flops for plan in plans),
        naive_flops=sum(plan.naive_flops for plan in plans),
        bytes=max(plan.bytes for plan in plans),
        budget=plans[0].budget,
    )


def _split_round_robin(indices: Sequence[int], n_groups: int) -> list[tuple[int, ...]]:
    """Split indices round-robin, so that every group has cheap and expensive interventions."""
    return [tuple(indices[first::n_groups]) for first in range(min(n_groups, len(indices)))]


def _merge_batches(
    pieces: Sequence[Batch], fits: Callable[[Sequence[Batch]], bool], processes: int
) -> list[list[Batch]]:
    """Merge consecutive batches into as few groups as fit into memory, but at least one for each process."""
    most = -(-len(pieces) // processes)
    groups: list[list[Batch]] = [[]]
    for piece in pieces:
        if groups[-1] and (len(groups[-1]) >= most or not fits([*groups[-1], piece])):
            groups.append([])
        groups[-1].append(piece)
    return groups


def measure_chunk(model: Model, batch: Batch, costs: ModelCosts) -> int:
    """Measure which size of chunk this machine computes fastest in a block of a model.

    A chunk that is too small leaves arithmetic units idle, a chunk that is too large exceeds the caches.
    For a streamed model, whose blocks are not in memory, and for one whose blocks cannot be run alone, a gated MLP of
    the same widths is timed instead.

    Args:
        model: Model whose first block is timed.
        batch: Batch of the sweep; its number of padded positions is used.
        costs: Widths of the model.

    Returns:
        The size of a chunk, in tokens.
    """
    width = batch.input_ids.shape[1]
    sizes = [2**power for power in range(6, 18 if model.device.type == "cuda" else 13)]
    copies = sorted({max(1, size // width) for size in sizes})
    whole = model.streamed is None and not model.weights.problem
    run = _block_runner(model, batch) if whole else _mlp_runner(model, costs, width)
    rates: dict[int, float] = {}
    for n in copies:
        if rates and n * width / rates[max(rates)] > CALIBRATION_S:
            break
        run(n)  # the first run takes longer and is not timed
        seconds: list[float] = []
        while sum(seconds) < TRIAL_S and (len(seconds) < 3 or (sum(seconds) < 0.02 and len(seconds) < 20)):
            start = time.perf_counter()
            run(n)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds.append(time.perf_counter() - start)
        rates[n] = n * width / min(seconds)  # the minimum, because other programs can only add time
        *before, last = rates.values()
        if len(before) > 2 and last < 1.03 * max(before):  # larger chunks would not be faster
            break
    best = max(rates.values())
    # Twice that size is still fast where only half of a chunk's positions are scored and go through the MLP.
    return 2 * min(n for n, rate in rates.items() if rate >= 0.92 * best) * width


@torch.inference_mode()
def _block_runner(model: Model, batch: Batch) -> Callable[[int], None]:
    row = batch.pieces(1)[0].to(model.device)
    inputs = block_inputs(model.hf, model.anatomy, row)
    block = block_of(model.hf, model.anatomy, 0)
    traits = MlpTraits(mlp_per_position=False, mlp_ends_in_down_proj=False)

    @torch.inference_mode()
    def run(copies: int) -> None:
        run_block(block, inputs.hidden.repeat(copies, 1, 1), inputs.arguments(0, copies), BlockOverrides(), traits)

    return run


def _mlp_runner(model: Model, costs: ModelCosts, width: int) -> Callable[[int], None]:
    dtype = next(model.hf.parameters()).dtype
    matrix = torch.randn(costs.d_mlp, costs.d_model, dtype=dtype, device=model.device) * 0.02

    @torch.inference_mode()
    def run(copies: int) -> None:
        states = torch.ones(copies * width, costs.d_model, dtype=dtype, device=model.device)
        wide = torch.nn.functional.linear(states, matrix)
        torch.nn.functional.linear(torch.nn.functional.silu(wide) * wide, matrix.T)

    return run
