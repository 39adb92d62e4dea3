"""How the work of a sweep is cut: into passes that fit the memory, shares for processes, and chunks that run fast."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dissect.engine.blocks import block_inputs
from dissect.engine.costs import ModelCosts, costs_of, pass_bytes, pass_flops
from dissect.engine.overrides import BlockOverrides, MlpTraits, run_block
from dissect.engine.schedule import Schedule, make_schedule
from dissect.interventions.intervention import Intervention
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.runtime.memory import Budget
from dissect.runtime.sizes import in_bytes
from unlearning.common.errors import InputError

CALIBRATION_S = 1.0
"""A chunk that would take longer than this is not tried."""
TRIAL_S = 0.1
"""After so long, a chunk of this size has been timed well enough."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One walk over the layers.

    Attributes:
        batches: the prompts that are in it.
        interventions: indices of the interventions that are in it.
        flops: operations that it takes.
    """

    batches: tuple[Batch, ...]
    interventions: tuple[int, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All passes of a sweep, and what they will take.

    Attributes:
        passes: in the order that they are run.
        chunk_tokens: how many tokens go through a block at once.
        max_branches: streams that are in memory together in the widest pass.
        flops: operations of all passes.
        naive_flops: operations of one full forward per intervention, with logits at every position.
        bytes: most memory that a pass takes beside the weights, about.
        budget: what the process may take.
    """

    passes: tuple[Pass, ...]
    chunk_tokens: int
    max_branches: int
    flops: int
    naive_flops: int
    bytes: int
    budget: Budget

    def record(self) -> dict[str, Any]:
        """What `run.json` keeps of it."""
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


def make_plan(
    models: Sequence[Model],
    prompts: Prompts,
    interventions: Sequence[Intervention],
    *,
    batches: Sequence[Batch],
    budget: Budget,
    chunk_tokens: int | None = None,
    processes: int = 1,
    n_sources: int = 1,
) -> Plan:
    """Cut a sweep so that every pass fits the budget and every process has its share.

    Examples are cut before interventions, because what is cut by interventions runs the base and the target again.
    Models that are streamed go through as few passes as the budget allows, since each reads them anew.

    Args:
        models: base first, then the targets.
        prompts: what is asked.
        interventions: what is done.
        batches: the prompts in batches as large as they may become.
        budget: memory that may be used.
        chunk_tokens: how much goes through a block at once; measured where it is not given.
        processes: how many share the work.
        n_sources: 2 where the donor's forward is another than the base's.

    Raises:
        InputError: not even one example under one intervention fits the budget (with the least that does).
    """
    base, n_targets = models[0], len(models) - 1
    costs = costs_of(base)
    chunk_tokens = chunk_tokens or measure_chunk(models[-1], batches[0], costs)
    itemsize = next(base.hf.parameters()).element_size()
    everything = tuple(range(len(interventions)))

    @cache
    def schedule_of(group: tuple[int, ...]) -> Schedule:
        return make_schedule([interventions[index] for index in group], base.n_layers)

    def bytes_of(some: Sequence[Batch]) -> int:
        assert chunk_tokens is not None
        schedules = [schedule_of(group) for group in groups]
        return max(
            pass_bytes(one, costs, some, n_targets, chunk=chunk_tokens, itemsize=itemsize, n_sources=n_sources)
            for one in schedules
        )

    rows = max(len(batch.examples) for batch in batches)
    rows = min(rows, max(1, -(-len(prompts) // processes)))
    groups = [everything]
    while True:
        pieces = [piece.trimmed() for batch in batches for piece in batch.pieces(rows)]
        longest = max(piece.input_ids.numel() for piece in pieces)
        least = max(bytes_of([piece]) for piece in pieces)
        if least <= budget.left:
            break
        if rows > 1:
            rows //= 2
        elif chunk_tokens > longest:
            chunk_tokens = max(longest, chunk_tokens // 2)
        elif len(groups) < len(interventions):
            groups = _dealt(everything, 2 * len(groups))
        else:
            raise InputError(
                f"--max-memory: at least {in_bytes(budget.held + least, up=True)} is needed and "
                f"{in_bytes(budget.allowed)} is allowed: program and weights hold {in_bytes(budget.held)}, and one "
                f"example under one intervention takes {in_bytes(least)}"
            )
    if len(pieces) * len(groups) < processes:
        groups = _dealt(everything, min(len(everything), -(-processes // len(pieces))))
    together = [[piece] for piece in pieces]
    if base.streamed is not None:
        together = _gathered(pieces, lambda some: bytes_of(some) <= budget.left, processes)
    passes = [
        Pass(
            tuple(some),
            group,
            sum(pass_flops(schedule_of(group), costs, piece, n_targets, n_sources=n_sources) for piece in some),
        )
        for some in together
        for group in groups
    ]
    forwards = n_sources + n_targets * (1 + len(interventions))
    return Plan(
        passes=tuple(passes),
        chunk_tokens=chunk_tokens,
        max_branches=max(schedule_of(group).max_branches for group in groups),
        flops=sum(one.flops for one in passes),
        naive_flops=sum(forwards * costs.forward(*piece.input_ids.shape) for piece in pieces),
        bytes=max(bytes_of(one.batches) for one in passes),
        budget=budget,
    )


def combined_plan(plans: Sequence[Plan]) -> Plan:
    """Several plans that are carried out one after the other, as one for a reader."""
    return Plan(
        passes=tuple(one for plan in plans for one in plan.passes),
        chunk_tokens=min(plan.chunk_tokens for plan in plans),
        max_branches=max(plan.max_branches for plan in plans),
        flops=sum(plan.flops for plan in plans),
        naive_flops=sum(plan.naive_flops for plan in plans),
        bytes=max(plan.bytes for plan in plans),
        budget=plans[0].budget,
    )


def _dealt(indices: Sequence[int], n_groups: int) -> list[tuple[int, ...]]:
    """Deal out indices like cards, so that long and short interventions meet in every group."""
    return [tuple(indices[first::n_groups]) for first in range(min(n_groups, len(indices)))]


def _gathered(pieces: Sequence[Batch], fits: Callable[[Sequence[Batch]], bool], processes: int) -> list[list[Batch]]:
    """As few groups of neighbouring batches as fit, but one for each process at least."""
    most = -(-len(pieces) // processes)
    groups: list[list[Batch]] = [[]]
    for piece in pieces:
        if groups[-1] and (len(groups[-1]) >= most or not fits([*groups[-1], piece])):
            groups.append([])
        groups[-1].append(piece)
    return groups


def measure_chunk(model: Model, batch: Batch, costs: ModelCosts) -> int:
    """The size of chunk, in tokens, that this machine puts through a block of this model fastest.

    Too small a chunk leaves the machine's arithmetic idle, too large a one its caches. For a streamed model, whose
    blocks are not in memory, a gated MLP of its widths is timed instead.
    """
    width = batch.input_ids.shape[1]
    sizes = [2**power for power in range(6, 18 if model.device.type == "cuda" else 13)]
    copies = sorted({max(1, size // width) for size in sizes})
    run = _mlp_runner(model, costs, width) if model.streamed else _block_runner(model, batch)
    rates: dict[int, float] = {}
    for n in copies:
        if rates and n * width / rates[max(rates)] > CALIBRATION_S:
            break
        run(n)  # what is run for the first time takes longer
        seconds: list[float] = []
        while sum(seconds) < TRIAL_S and (len(seconds) < 3 or (sum(seconds) < 0.02 and len(seconds) < 20)):
            start = time.perf_counter()
            run(n)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds.append(time.perf_counter() - start)
        rates[n] = n * width / min(seconds)  # whatever else the machine does only adds to them
        *before, last = rates.values()
        if len(before) > 2 and last < 1.03 * max(before):  # larger ones will gain nothing either
            break
    best = max(rates.values())
    # Fast enough still where only half of a chunk's positions are scored, and so go through the MLP.
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
