"""One block with parts of it replaced: what its MLP lets be left out is found out, not assumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from dissect.engine.blocks import block_inputs
from dissect.engine.overrides import (
    BlockActivations,
    BlockOverrides,
    MlpTraits,
    at_positions,
    find_mlp_traits,
    find_unused_modules,
    run_block,
    scatter,
)
from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.models.anatomy import block_of, find_adapter, find_anatomy
from dissect.models.model import Model
from tests.dissect.helpers import (
    PlainPatcher,
    assert_close,
    build_batch,
    build_model,
    build_pair,
    plain_inputs,
    run_engine,
    site_module,
)
from unlearning.common.errors import InputError


class ScalingMLP(LlamaMLP):
    """What it writes is not what its down projection gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class MixingMLP(LlamaMLP):
    """What it writes at one position depends on those before."""

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return super().forward(x + before)


class TupleMLP(LlamaMLP):
    """It gives more than states."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def habits_of(family: str, mlp: type[LlamaMLP] | None = None) -> MlpTraits:
    model = build_pair(family).base
    block = block_of(model.hf, model.anatomy, 0)
    if mlp is not None:
        assert block.mlp is not None
        block.mlp.__class__ = mlp
    return find_mlp_traits(block, torch.zeros(1, 1, 32))


@pytest.mark.parametrize(
    ("family", "mlp", "per_position", "ends_in_down_proj"),
    [
        ("llama", None, True, True),
        ("gpt2", None, True, True),
        ("neox", None, True, True),
        ("phi3", None, True, True),
        ("gemma2", None, True, True),
        ("mixtral", None, True, False),
        ("bloom", None, False, False),  # wants the residual stream too
        ("opt", None, False, False),  # has no module of its own
        ("llama", ScalingMLP, True, False),
        ("llama", TupleMLP, False, False),
    ],
)
def test_the_habits_of_an_mlp_are_found_out(
    family: str, mlp: type[LlamaMLP] | None, per_position: bool, ends_in_down_proj: bool
) -> None:
    assert habits_of(family, mlp) == MlpTraits(per_position, ends_in_down_proj)


def assert_equals_plain_hooks(mlp: type[LlamaMLP], folder: Path) -> None:
    """Of a pair whose MLPs are of that class."""
    plain = build_pair("llama", dtype=torch.float64)
    for model in (plain.base, plain.unlearned):
        for layer in range(3):
            block = block_of(model.hf, model.anatomy, layer)
            assert block.mlp is not None
            block.mlp.__class__ = mlp
    base, unlearned = (Model.wrap(model.hf, plain.tokenizer, name="m") for model in (plain.base, plain.unlearned))
    batch = build_batch(folder, "right")
    items = [
        Intervention(sites, window)
        for sites in (("mlp_coef",), ("mlp_out",), ("attn_out",), ("mlp_coef", "attn_out"), ("value_vectors",))
        for window in (Window(1, (1,)), Window(2, (2,)), Window(1, (0, 1, 2)))
    ]
    oracle = PlainPatcher(base.hf, unlearned.hf, plain_inputs(base, batch))
    scored = batch.rows, batch.columns
    ((swept,),) = run_engine("wavefront", [base, unlearned], [batch], items, chunk_tokens=200)
    assert_close(swept.target, oracle.logits()[scored], atol=1e-9)
    for item, logits in zip(items, swept.intervened, strict=True):
        assert_close(logits, oracle.logits(item.sites, item.window.layers)[scored], atol=1e-9)


def test_an_mlp_that_scales_its_down_projection_is_run_as_it_is(tmp_path: Path) -> None:
    assert_equals_plain_hooks(ScalingMLP, tmp_path)


def test_an_mlp_that_mixes_positions_is_refused_by_name(tmp_path: Path) -> None:
    """What is left out of others would have been read by it."""
    with pytest.raises(InputError, match="engine.*MixingMLP mixes positions"):
        assert_equals_plain_hooks(MixingMLP, tmp_path)


ATTN, MLP, BOTH = frozenset({"attn_out"}), frozenset({"mlp_out"}), frozenset({"attn_out", "mlp_out"})


@pytest.mark.parametrize(
    ("family", "beside_attn", "beside_mlp", "beside_both"),
    [
        ("llama", {"input_layernorm"}, {"post_attention_layernorm"}, {"input_layernorm", "post_attention_layernorm"}),
        ("gpt2", {"ln_1"}, {"ln_2"}, {"ln_1", "ln_2"}),
        ("neox", {"input_layernorm"}, {"post_attention_layernorm"}, {"input_layernorm", "post_attention_layernorm"}),
        ("gptj", set(), set(), {"ln_1"}),  # one norm for both
        ("olmo2", set(), set(), set()),  # its norms come afterwards
        (
            "gemma2",
            {"input_layernorm"},
            {"pre_feedforward_layernorm"},
            {"input_layernorm", "pre_feedforward_layernorm"},
        ),
    ],
)
@torch.no_grad()
def test_norms_that_nothing_reads_are_found_and_not_run(
    family: str, beside_attn: set[str], beside_mlp: set[str], beside_both: set[str], tmp_path: Path
) -> None:
    model, batch = build_pair(family).base, build_batch(tmp_path, "left")
    inputs = block_inputs(model.hf, model.anatomy, batch)
    block = block_of(model.hf, model.anatomy, 0)
    traits = find_mlp_traits(block, inputs.hidden)
    unused = find_unused_modules(block, inputs.hidden, inputs.arguments(0, 1), traits)
    expected = {ATTN: beside_attn, MLP: beside_mlp, BOTH: beside_both}
    assert {given: set(names) for given, names in unused.items()} == expected
    given = torch.randn_like(inputs.hidden)
    overrides = BlockOverrides(attn_out=given, mlp_out=given * 2, attn_extras=(None,), mlp_extras=None)
    run: list[str] = []
    for name in unused[BOTH]:
        forward = block.whole.get_submodule(name).forward
        block.whole.get_submodule(name).forward = lambda states, n=name, f=forward: (run.append(n), f(states))[1]
    lazy = run_block(block, inputs.hidden, inputs.arguments(0, 1), overrides, replace(traits, unused_modules=unused))
    assert not run
    assert torch.equal(lazy, run_block(block, inputs.hidden, inputs.arguments(0, 1), overrides, traits))
    assert set(run) == expected[BOTH]


@torch.no_grad()
def test_a_norm_whose_values_are_mended_on_the_way_is_not_idle(tmp_path: Path) -> None:
    """NaN does not show where a block replaces it; the numbers do."""
    model, batch = build_pair("llama").base, build_batch(tmp_path, "right")
    inputs = block_inputs(model.hf, model.anatomy, batch)
    block = block_of(model.hf, model.anatomy, 0)
    assert block.mlp is not None
    forward = block.mlp.forward
    block.mlp.forward = lambda states: forward(states.nan_to_num())
    unused = find_unused_modules(block, inputs.hidden, inputs.arguments(0, 1), find_mlp_traits(block, inputs.hidden))
    assert unused[ATTN] == ("input_layernorm",)
    assert unused[MLP] == ("post_attention_layernorm",)


def test_values_are_spread_to_their_places_and_zero_elsewhere() -> None:
    kept = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = [[[0, 0], [3, 4], [0, 0]], [[0, 0], [0, 0], [1, 2]]]
    assert scatter(kept, torch.tensor([5, 1]), (2, 3)).tolist() == expected


def test_a_module_runs_at_its_positions_only() -> None:
    module, seen = torch.nn.Linear(4, 3), []
    module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    states, positions = torch.randn(2, 5, 4), torch.tensor([0, 7])
    with torch.no_grad():
        narrow, whole = at_positions(module, positions)(states), module(states)
    assert torch.allclose(narrow.flatten(0, 1)[positions], whole.flatten(0, 1)[positions])
    assert narrow.abs().sum(-1).flatten().nonzero()[:, 0].tolist() == [0, 7]
    assert seen == [(2, 5, 4)]  # the narrow run calls the forward, which hooks do not see


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "olmo2", "gptj", "opt", "falcon", "bloom"])
@torch.no_grad()
def test_an_untreated_block_is_itself_and_what_is_seen_is_what_hooks_see(family: str, tmp_path: Path) -> None:
    model, batch = build_pair(family).base, build_batch(tmp_path, "right")
    inputs = block_inputs(model.hf, model.anatomy, batch)
    block = block_of(model.hf, model.anatomy, 1)
    args, kwargs = inputs.arguments(1, 1)
    output = block.whole(inputs.hidden, *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    traits, seen = find_mlp_traits(block, inputs.hidden), BlockActivations()
    assert torch.equal(
        run_block(block, inputs.hidden, (args, kwargs), BlockOverrides(), traits, activations=seen), output
    )
    noted: dict[str, Tensor] = {}
    assert block.down_proj is not None and block.attn_out is not None
    handles = [
        block.down_proj.register_forward_pre_hook(lambda _module, given: noted.update(coef=given[0].clone())),
        block.attn_out.register_forward_hook(
            lambda _module, _args, out: noted.update(attn=(out[0] if isinstance(out, tuple) else out).clone())
        ),
    ]
    block.whole(inputs.hidden, *args, **kwargs)
    for handle in handles:
        handle.remove()
    assert seen.mlp_coef is not None and seen.attn_out is not None and seen.mlp_out is not None
    assert torch.equal(seen.mlp_coef, noted["coef"].view_as(seen.mlp_coef))
    assert torch.equal(seen.attn_out, noted["attn"])
    assert seen.mlp_out.shape == inputs.hidden.shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "olmo2", "gemma2", "qwen3", "gptj", "mixtral", "opt"])
@torch.no_grad()
def test_a_block_run_for_some_positions_is_right_there(family: str, tmp_path: Path) -> None:
    model, batch = build_pair(family).base, build_batch(tmp_path, "left")
    inputs = block_inputs(model.hf, model.anatomy, batch)
    block = block_of(model.hf, model.anatomy, 2)
    traits = find_mlp_traits(block, inputs.hidden)
    positions = batch.rows * batch.input_ids.shape[1] + batch.columns
    whole = run_block(block, inputs.hidden, inputs.arguments(2, 1), BlockOverrides(), traits)
    narrow = run_block(
        block, inputs.hidden, inputs.arguments(2, 1), BlockOverrides(positions=positions, limits_attention=True), traits
    )
    ours, theirs = (states.flatten(0, 1)[positions] for states in (narrow, whole))
    assert_close(ours, theirs, atol=1e-5)
    assert not torch.allclose(narrow, whole)  # elsewhere it was not computed


def test_site_modules_of_the_tests_are_those_of_the_anatomy() -> None:
    """The plain hooks' own table and TransformerLens' adapters name the same modules."""
    for family in ("llama", "gpt2", "neox", "gemma2", "olmo2", "phi3", "qwen3", "mistral"):
        hf = build_model(family)
        block = block_of(hf, find_anatomy(hf, find_adapter(hf, name=family)), 0)
        assert block.down_proj is site_module(block.whole, "mlp_coef")
        assert block.mlp is site_module(block.whole, "mlp_out")
        assert block.o_proj is site_module(block.whole, "attn_out")
