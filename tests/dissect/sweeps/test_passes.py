"""A planned sweep: cut anyhow it gives one table, and short memory only makes it slower."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dissect import patch
from dissect.interventions.intervention import sweep
from dissect.interventions.windows import centred_windows
from dissect.models.pair import ModelPair
from dissect.models.sites import parse_sites
from dissect.models.taken_apart import replaced_forward
from dissect.prompts.prompts import Prompts
from dissect.runtime.memory import Budget
from dissect.sweeps.passes import in_order
from dissect.sweeps.result import SweepResult
from tests.dissect.helpers import assert_close, build_pair, build_prompts, decoder_blocks, torch_state
from unlearning.common.errors import InputError

SITES = ["mlp_coef", "attn_out", "mlp_coef+attn_out", "mlp_out", "resid_post"]
NUMBERS = ["loss_unlearned", "loss_intervened", "krs", "kl_recovery", "logprob_intervened", "centred_loss_intervened"]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return build_pair("llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return build_prompts(tmp_path_factory.mktemp("sweeping"))


def run(pair: ModelPair, prompts: Prompts, **options: Any) -> SweepResult:
    defaults = {"sites": SITES, "window": 1, "control": None, "chunk_tokens": 1000, "progress": False}
    return patch(pair, prompts, **(defaults | options))


@pytest.fixture(scope="module")
def whole(pair: ModelPair, prompts: Prompts) -> SweepResult:
    return run(pair, prompts)


def assert_same_table(ours: SweepResult, theirs: SweepResult) -> None:
    labels = [name for name in theirs.frame if theirs.frame[name].dtype != "float64"]
    pd.testing.assert_frame_equal(ours.frame[labels], theirs.frame[labels])
    assert_close(ours.frame[NUMBERS].to_numpy(), theirs.frame[NUMBERS].to_numpy(), atol=2e-5)


@settings(max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch_size=st.integers(1, 5),
    chunk_tokens=st.sampled_from([1, 30, 600, 10_000]),
    share=st.sampled_from([0.1, 0.3, 0.6, 1.0]),
    engine=st.sampled_from(["wavefront", "wavefront", "reference"]),
)
def test_the_table_is_the_same_however_the_work_is_cut(
    pair: ModelPair,
    prompts: Prompts,
    whole: SweepResult,
    batch_size: int,
    chunk_tokens: int,
    share: float,
    engine: str,
) -> None:
    budget = Budget(allowed=int(share * 3e6), held=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dissect.sweeps.run.memory_budget", lambda *_arguments, **_options: budget)
        ours = run(pair, prompts, batch_size=batch_size, chunk_tokens=chunk_tokens, engine=engine)
    assert_same_table(ours, whole)


@contextmanager
def room_for(tokens: int, *modules: nn.Module) -> Iterator[list[int]]:
    """Let modules fail as on a full device when they are given more tokens; yields how many each call had."""
    calls: list[int] = []

    def limit(_module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args[0].shape[0] * args[0].shape[1])
        if calls[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(limit).remove)
        yield calls


@pytest.mark.parametrize("room", [250, 60, 40])
def test_short_memory_makes_smaller_chunks_and_says_so_and_changes_no_number(
    pair: ModelPair, prompts: Prompts, whole: SweepResult, room: int, tmp_path: Path
) -> None:
    """Room for some copies of the batch, for one, and for a few of its rows."""
    blocks = [*decoder_blocks(pair.unlearned.hf), *decoder_blocks(pair.base.hf)]
    with room_for(room, *blocks) as calls, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = run(pair, prompts, out=tmp_path / "run")
    assert_same_table(ours, whole)
    assert max(calls) > room
    chunks = [
        int(text.split()[-2])
        for text in (str(warning.message) for warning in seen)
        if text.startswith("out of memory: ")
    ]
    assert chunks == sorted(chunks, reverse=True)
    assert 0 < len(chunks) < 10
    assert ours.measured["chunk_tokens"] == chunks[-1] <= room
    assert not list((tmp_path / "run").rglob("*.part"))


def test_memory_that_is_short_for_one_copy_is_refused_in_one_line(pair: ModelPair, prompts: Prompts) -> None:
    before = [torch_state(model) for model in (pair.base, pair.unlearned)]
    longest = max(len(item.input_ids) for item in prompts.items) - 1
    with (
        room_for(5, *decoder_blocks(pair.unlearned.hf)),
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(InputError) as refused,
    ):
        run(pair, prompts)
    assert str(refused.value).startswith(
        f"out of memory with {longest} tokens at once, and the longest prompt has {longest}; shorten it, "
    )
    assert "\n" not in str(refused.value)
    assert [torch_state(model) for model in (pair.base, pair.unlearned)] == before


def test_another_error_is_passed_on(pair: ModelPair, prompts: Prompts) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    before = torch_state(pair.unlearned)
    with (
        replaced_forward(decoder_blocks(pair.unlearned.hf)[1], fail),
        pytest.raises(RuntimeError, match="cannot be multiplied"),
    ):
        run(pair, prompts)
    assert torch_state(pair.unlearned) == before


def test_the_process_s_precision_holds_in_a_run_and_is_put_back(pair: ModelPair, prompts: Prompts) -> None:
    before = torch.get_float32_matmul_precision()
    inside: list[str] = []
    attention = decoder_blocks(pair.unlearned.hf)[0].self_attn
    handle = attention.register_forward_pre_hook(
        lambda *_arguments: inside.append(torch.get_float32_matmul_precision())
    )
    try:
        for precision in ("highest", "high"):
            inside.clear()
            assert run(pair, prompts, precision=precision).configuration["precision"] == precision
            assert set(inside) == {precision}
            assert torch.get_float32_matmul_precision() == before
    finally:
        handle.remove()


def test_a_table_is_ordered_and_each_row_stands_once(whole: SweepResult) -> None:
    interventions = sweep(parse_sites(SITES), centred_windows(3, 1))
    shuffled = pd.concat([whole.frame.sample(frac=1, random_state=0), whole.frame.sample(5, random_state=1)])
    back = in_order(shuffled.reset_index(drop=True), ["main"], interventions)
    pd.testing.assert_frame_equal(back, whole.frame)
    places = list(zip(whole.frame["site"], whole.frame["centre"], whole.frame["example_index"], strict=True))
    assert places == [
        ("+".join(item.sites), item.window.centre, example) for item in interventions for example in range(5)
    ]
