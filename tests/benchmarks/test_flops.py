"""The naive count of operations against torch's own counter."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.case import Case, build_case
from benchmarks.contestants import notebook, wavefront
from benchmarks.flops import forward_flops, naive_sweep_flops
from dissect.engine.costs import costs_of
from dissect.scoring.forward import scored_logits
from tests.benchmarks.helpers import build_micro_case


def build_llama(*, heads: int = 4, kv_heads: int = 4, head_dim: int | None = None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="eager",  # whose products the counter sees one by one
    )
    return LlamaForCausalLM(config)


def counted(run: Callable[[], object]) -> int:
    """What torch counts, less the rotary angles, which are an outer product of positions and frequencies."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    by_module = counter.get_flop_counts()
    rotary = [sum(of.values()) for name, of in by_module.items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rotary)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, None), (2, None), (1, 16)])
def test_forward_flops_are_what_torch_counts(kv_heads: int, head_dim: int | None) -> None:
    model = build_llama(kv_heads=kv_heads, head_dim=head_dim)
    ids = torch.randint(50, (3, 7))
    assert forward_flops(model.config, rows=3, positions=7) == counted(lambda: model(ids, use_cache=False))


def test_the_engines_own_count_of_a_forward_is_this_one() -> None:
    case = build_micro_case()
    ours = costs_of(case.pair.base).forward(3, 11)
    assert ours == forward_flops(case.config, rows=3, positions=11)


def in_eager_attention(case: Case) -> Case:
    for model in (case.pair.base.hf, case.pair.unlearned.hf):
        model.set_attn_implementation("eager")
    return case


def test_naive_flops_are_those_of_a_whole_notebook_sweep() -> None:
    case = in_eager_attention(build_micro_case())
    run = notebook.prepare(case.pair, case.interventions)
    assert counted(lambda: run(case.batches)) == case.naive_flops
    one = naive_sweep_flops(case.config, rows=1, positions=11, interventions=1)
    assert one == 3 * forward_flops(case.config, rows=1, positions=11)


def test_planned_flops_are_those_of_our_sweep() -> None:
    case = in_eager_attention(build_case("tiny", device=torch.device("cpu"), dtype=torch.float32, among=("tiny",)))
    run = wavefront.prepare(case.pair, case.interventions)
    run(case.batches)  # the first calibrates
    planned, done = wavefront.planned_flops(case), counted(lambda: run(case.batches))
    # More is done than planned: one prompt goes through the whole base to prove that its blocks were put together
    # rightly, and how a block is put together, and that a site is the whole output of its part, by running one.
    proof = counted(lambda: scored_logits(case.pair.base, case.batches[0].pieces(1)[0]))
    assert planned <= done - proof < 1.13 * planned < 0.5 * case.naive_flops
