"""Plans: everything is computed once, whatever the cut; what does not fit is cut further or refused with the least."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dissect.engine import plan as planning
from dissect.engine.costs import costs_of, pass_bytes, pass_flops
from dissect.engine.plan import Pass, Plan, make_plan, measure_chunk
from dissect.engine.schedule import make_schedule
from dissect.interventions.intervention import Intervention, sweep
from dissect.interventions.windows import centred_windows
from dissect.models.model import Model
from dissect.models.sites import PATCH_SITES
from dissect.prompts.prompts import Batch, Prompt, Prompts
from dissect.runtime.memory import Budget
from dissect.runtime.sizes import parse_bytes
from tests.dissect.helpers import build_pair, plain_inputs
from unlearning.common.errors import InputError

PLENTY = Budget(allowed=10**12, held=0)


@cache
def models() -> tuple[Model, Model]:
    pair = build_pair("llama")
    return pair.base, pair.unlearned


@cache
def streamed() -> tuple[Model, ...]:
    """For a plan it only matters that they are."""
    return tuple(replace(model, streamed=object()) for model in models())  # type: ignore[arg-type]


def build_lengths(lengths: list[tuple[int, int]], groups: int = 0) -> Prompts:
    """Prompts of so many tokens and then so many of an answer; with groups, scored as the notebooks do."""
    items = [
        Prompt(
            id=f"q{number}",
            group=f"g{number % groups}" if groups else "",
            prompt="",
            answer="",
            input_ids=tuple((7 * number + 3 * place) % 300 + 1 for place in range(prompt + answer)),
            answer_start=prompt,
            scored=range(prompt, prompt + answer) if groups else range(prompt - 1, prompt + answer - 1),
        )
        for number, (prompt, answer) in enumerate(lengths)
    ]
    return Prompts(tuple(items), "notebook" if groups else "answer", 0, "nowhere")


INTERVENTIONS = sweep(PATCH_SITES, centred_windows(3, 3))
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=9)


def bytes_of(one: Pass, plan: Plan, interventions: list[Intervention], n_targets: int) -> int:
    base = models()[0]
    schedule = make_schedule([interventions[index] for index in one.interventions], 3)
    chunk = plan.chunk_tokens
    return pass_bytes(schedule, costs_of(base), one.batches, n_targets, chunk=chunk, itemsize=4)


@settings(max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=LENGTHS,
    n_interventions=st.integers(1, len(INTERVENTIONS)),
    batch_size=st.integers(1, 9),
    side=st.sampled_from(["left", "right"]),
    groups=st.integers(0, 3),
    kilobytes=st.sampled_from([40, 60, 100, 150, 200, 300, 500, 1000, 10**6]),
    held=st.sampled_from([0, 10**8]),
    chunk_tokens=st.sampled_from([1, 20, 100, 2000]),
    processes=st.integers(1, 5),
    are_streamed=st.booleans(),
    n_targets=st.integers(1, 2),
)
def test_every_example_meets_every_intervention_once_within_the_budget(
    lengths: list[tuple[int, int]],
    n_interventions: int,
    batch_size: int,
    side: Any,
    groups: int,
    kilobytes: int,
    held: int,
    chunk_tokens: int,
    processes: int,
    are_streamed: bool,
    n_targets: int,
) -> None:
    prompts, interventions = build_lengths(lengths, groups), INTERVENTIONS[:n_interventions]
    base, target = streamed() if are_streamed else models()
    budget = Budget(allowed=held + 1000 * kilobytes, held=held)

    def planned(budget: Budget) -> Plan:
        return make_plan(
            [base, *[target] * n_targets],
            interventions,
            batches=prompts.batches(batch_size, padding_side=side),
            budget=budget,
            chunk_tokens=chunk_tokens,
            processes=processes,
        )

    try:
        plan = planned(budget)
    except InputError as error:
        (least,) = re.findall(r"at least (.+), got", str(error))
        assert parse_bytes(least) > budget.allowed
        plan = planned(Budget(allowed=parse_bytes(least), held=held))
        budget = plan.budget
    pairs = [
        (example, index)
        for one in plan.passes
        for batch in one.batches
        for example in batch.examples
        for index in one.interventions
    ]
    assert sorted(pairs) == [(example, index) for example in range(len(prompts)) for index in range(n_interventions)]
    sizes = [bytes_of(one, plan, interventions, n_targets) for one in plan.passes]
    assert plan.bytes == max(sizes) <= budget.left
    assert 1 <= plan.chunk_tokens <= chunk_tokens
    if are_streamed:
        n_batches = len({batch.examples for one in plan.passes for batch in one.batches})
        assert max(len(one.batches) for one in plan.passes) <= -(-n_batches // processes)
    else:
        assert len(plan.passes) >= min(processes, n_interventions)
    assert plan.flops == sum(one.flops for one in plan.passes)
    record = plan.record()
    assert record["passes"] == len(plan.passes)
    assert record["interventions_per_pass"] <= n_interventions


def build_plan(prompts: Prompts, **options: Any) -> Plan:
    defaults = {"batches": prompts.batches(16), "budget": PLENTY, "chunk_tokens": 100}
    return make_plan(models(), INTERVENTIONS, **(defaults | options))


def test_what_fits_is_not_cut() -> None:
    prompts = build_lengths([(5, 3)] * 6)
    (one,) = build_plan(prompts).passes
    assert one.interventions == tuple(range(len(INTERVENTIONS)))
    assert [batch.examples for batch in one.batches] == [tuple(range(6))]
    assert one.batches[0].input_ids.shape == (6, 7)  # the last token of an answer predicts nothing


def test_examples_are_cut_before_interventions() -> None:
    prompts = build_lengths([(5, 3)] * 6)
    whole = build_plan(prompts)
    halved = build_plan(prompts, budget=Budget(allowed=whole.bytes - 1, held=0))
    assert [one.batches[0].examples for one in halved.passes] == [(0, 1, 2), (3, 4, 5)]
    assert {one.interventions for one in halved.passes} == {tuple(range(len(INTERVENTIONS)))}
    assert halved.flops == whole.flops  # no pass runs anything twice
    single = build_plan(build_lengths([(5, 3)]), chunk_tokens=7)
    dealt = build_plan(build_lengths([(5, 3)]), chunk_tokens=7, budget=Budget(allowed=single.bytes - 1, held=0))
    assert len(dealt.passes) == 2
    assert dealt.flops > single.flops  # base and target are run in both


def test_streamed_models_go_through_as_few_passes_as_fit() -> None:
    prompts = build_lengths([(5, 3)] * 6)
    batches = prompts.batches(2)
    apart = build_plan(prompts, batches=batches)
    together = make_plan(streamed(), INTERVENTIONS, batches=batches, budget=PLENTY, chunk_tokens=100)
    assert [len(one.batches) for one in apart.passes] == [1, 1, 1]
    assert [len(one.batches) for one in together.passes] == [3]
    tighter = Budget(allowed=together.bytes - 1, held=0)
    fewer = make_plan(streamed(), INTERVENTIONS, batches=batches, budget=tighter, chunk_tokens=100)
    assert [len(one.batches) for one in fewer.passes] == [2, 1]


def test_every_process_gets_something_to_do() -> None:
    prompts = build_lengths([(5, 3)] * 2)
    by_examples = build_plan(prompts, processes=2)
    assert [one.batches[0].examples for one in by_examples.passes] == [(0,), (1,)]
    by_interventions = build_plan(prompts, processes=6)
    assert len(by_interventions.passes) == 6
    assert {len(one.interventions) for one in by_interventions.passes} == {3}


def test_the_operations_of_a_plan_are_those_of_its_passes_and_of_plain_forwards() -> None:
    prompts = build_lengths([(5, 3), (9, 2), (4, 4)])
    plan = build_plan(prompts, batches=prompts.batches(2))
    costs, schedule = costs_of(models()[0]), make_schedule(INTERVENTIONS, 3)
    assert plan.flops == sum(pass_flops(schedule, costs, one.batches[0], 1) for one in plan.passes)
    shapes = [(2, 10), (1, 7)]  # the longest of each batch without its last token
    assert [tuple(one.batches[0].input_ids.shape) for one in plan.passes] == shapes
    naive = (1 + 1 + len(INTERVENTIONS)) * sum(costs.forward(*shape) for shape in shapes)
    assert plan.naive_flops == naive > plan.flops
    assert plan.max_branches == schedule.max_branches


def test_too_little_for_anything_is_refused_with_the_least_and_what_takes_it() -> None:
    with pytest.raises(
        InputError,
        match=r"`max_memory` must be at least .+, got 10 MB: .+ 300 MB, .+ kB",
    ):
        build_plan(build_lengths([(5, 3)]), budget=Budget(allowed=10**7, held=3 * 10**8))


def test_a_chunk_is_measured_where_none_is_given() -> None:
    prompts = build_lengths([(20, 5)] * 3)
    (batch,) = prompts.batches(16)
    chunk = measure_chunk(models()[1], batch, costs_of(models()[0]))
    assert chunk % 25 == 0  # whole prompts
    assert 50 <= chunk <= 2**13
    assert build_plan(prompts, chunk_tokens=None).chunk_tokens % 25 == 0


def test_half_a_chunk_is_the_smallest_that_is_nearly_as_fast_as_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does 100 tokens in the time of one, 200 at once a little better, and more than 400 badly."""
    now = 0.0

    def runner(_model: Model, _batch: Batch) -> Any:
        def run(copies: int) -> None:
            nonlocal now
            tokens = 10 * copies
            rate = {True: 1000.0, False: 500.0}[tokens >= 250] * (0.5 if tokens > 1100 else 1.0)
            rate *= 1.02 if tokens == 510 else 1.0
            now += tokens / rate / 100

        return run

    monkeypatch.setattr(planning, "_block_runner", runner)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: now)
    (batch,) = build_lengths([(6, 4)]).batches(1)
    assert measure_chunk(models()[0], batch, costs_of(models()[0])) == 500


@settings(max_examples=60, derandomize=True)
@given(lengths=LENGTHS, side=st.sampled_from(["left", "right"]), groups=st.integers(0, 2), rows=st.integers(1, 9))
@torch.no_grad()
def test_cutting_and_trimming_a_batch_keeps_its_scored_logits(
    lengths: list[tuple[int, int]], side: Any, groups: int, rows: int
) -> None:
    base = models()[0]
    for batch in build_lengths(lengths, groups).batches(9, padding_side=side):
        whole = base.hf(**plain_inputs(base, batch)).logits[batch.rows, batch.columns]
        pieces = [piece.trimmed() for piece in batch.pieces(rows)]
        assert [example for piece in pieces for example in piece.examples] == list(batch.examples)
        assert all(len(piece.examples) <= rows for piece in pieces)
        cut = [base.hf(**plain_inputs(base, piece)).logits[piece.rows, piece.columns] for piece in pieces]
        torch.testing.assert_close(torch.cat(cut), whole, rtol=0, atol=2e-5)
        assert torch.equal(torch.cat([piece.next_tokens for piece in pieces]), batch.next_tokens)
        for piece in pieces:
            assert piece.input_ids.shape[1] == int(piece.columns.max()) + 1
