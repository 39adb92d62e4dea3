"""Every family of decoders against plain hooks on the Hugging Face model itself, in both engines; or refused."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.models.anatomy import find_adapter, find_anatomy
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.parameter_swap import restored_values
from dissect.models.sites import SITES
from dissect.models.weights import WeightNames, find_weights
from tests.dissect.families import CONFIGURATIONS, build, compare, randomised, run
from tests.dissect.helpers import assert_close, build_batch, change_weights, run_engine
from tests.unlearning.helpers import build_tokenizer
from unlearning.common.errors import InputError

NOT_SUPPORTED = {
    "qwen3-next": "layers 0, 1 have no attention",
    "recurrent gemma": "its blocks have no attention",
    "granite hybrid": "layers 0, 2 have no attention",
    "mamba": "its blocks have no attention",
    "mamba 2": "its blocks have no attention",
    "falcon mamba": "its blocks have no attention",
    "bamba": "layers 0, 2 have no attention",
    "jamba": "layers 0, 2 have no attention",
    "lfm 2": "layers 0, 2 have no attention",
    "lfm 2 mixture": "layers 0, 2 have no attention",
    "zamba 2": "its blocks have no attention",
    "nemotron h": "its blocks have no attention",
    "qwen 3.5": "layers 0 have no attention",
    "olmo hybrid": "layers 0, 1 have no attention",
    "rwkv": "its blocks have no attention",
    "hrm": "its blocks are no list that is run once",
    "ministral": "TransformerLens does not support MinistralForCausalLM",
    "gemma 3n": "TransformerLens does not support Gemma3nForCausalLM",
    "phi mixture": "TransformerLens does not support PhimoeForCausalLM",
    "helium": "TransformerLens does not support HeliumForCausalLM",
}
ONE_BY_ONE = {"falcon h1", "gemma 4", "glm 5"}
"""Families whose blocks cannot be run one by one: the reference engine alone."""
SUPPORTED = [name for name in CONFIGURATIONS if name not in NOT_SUPPORTED]
QUICK = ("bloom", "falcon, alibi", "opt, post-norm, projected", "modernbert decoder", "the first gpt", "llama 4")
"""Each is one of a kind: residuals inside, biases of positions, parts outside, lists of outputs, layers that differ."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SUPPORTED]
)
def test_every_site_equals_plain_hooks_in_both_engines_or_is_refused(name: str, tmp_path: Path) -> None:
    rows = compare(build(name), build_batch(tmp_path, "left"))
    supported = [row for row in rows if not row.refused]
    assert {"attn_out", "resid_post"} <= {row.site for row in supported}
    for row in supported:
        assert row.moved > 1e-4, f"{row.site} does too little to be compared"
        assert set(row.gaps) | set(row.errors) == {"wavefront", "reference"}
        assert set(row.errors) == ({"wavefront"} if name in ONE_BY_ONE else set()), row.errors
        assert all(gap < 1e-4 for gap in row.gaps.values()), row
    assert all("\n" not in text for row in rows for text in (row.refused, *row.errors.values()))


def empty(name: str) -> Any:
    """A model of a configuration whose weights are nowhere."""
    kind, fields = CONFIGURATIONS[name]
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_in_one_line_without_any_weight(name: str) -> None:
    hf = empty(name)
    with pytest.raises(InputError, match=NOT_SUPPORTED[name]) as refused:
        find_anatomy(hf, find_adapter(hf, name="mine"))
    assert "\n" not in str(refused.value)


def names_of(hf: Any) -> WeightNames:
    adapter = find_adapter(hf, name="mine")
    return find_weights(hf, find_anatomy(hf, adapter), adapter)


IN_BLOCK = ("attn_weights", "key_vectors", "value_vectors", "router", "norms")


@given(name=st.sampled_from(SUPPORTED))
@settings(max_examples=8, deadline=None)
def test_every_parameter_belongs_to_exactly_one_site(name: str) -> None:
    """Or to none where a block has more than attention, MLP and norms."""
    names = names_of(empty(name))
    found: Counter[str] = Counter()
    for layer in range(names.n_layers):
        for site in IN_BLOCK:
            found.update(list(names.at([site], layer)))
    found.update([*names.at(["embed"], "before"), *names.at(["norms"], "after"), *names.at(["unembed"], "after")])
    assert max(found.values()) == 1
    others = set(names.all_names) - set(found)
    if name == "falcon h1":
        assert others and all(".mamba." in n for n in others)
    elif name == "gemma 4":
        assert others
    else:
        assert not others


def change_routers_buffers(hf: Any) -> None:
    """Turn round what corrects the scores of experts where that is no parameter, so that others are chosen."""
    for name, buffer in hf.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer += torch.tensor([1.0, -1.0]).repeat(buffer.numel() // 2)


@pytest.mark.parametrize("name", ["opt, projected", "modernbert decoder", "xglm", "bloom"])
def test_uses_of_parameters_are_the_same_whether_their_values_are_in_memory_or_not(name: str) -> None:
    there, nowhere = names_of(build(name)), names_of(empty(name))
    assert (there.before, there.final_norm, there.head) == (nowhere.before, nowhere.final_norm, nowhere.head)


@pytest.mark.parametrize(
    ("name", "before", "norms", "head"),
    [
        (
            "opt, projected",
            {"embed_tokens.weight", "embed_positions.weight", "project_in.weight"},
            {"final_layer_norm.weight", "final_layer_norm.bias"},
            {"project_out.weight", "lm_head.weight"},
        ),
        (
            "modernbert decoder",
            {"tok_embeddings.weight", "norm.weight"},
            {"final_norm.weight", "norm.weight"},
            {"dense.weight", "decoder.weight", "decoder.bias"},
        ),
        ("xglm", {"embed_tokens.weight"}, {"layer_norm.weight", "layer_norm.bias"}, {"lm_head.weight"}),
        (
            "bloom",
            {"word_embeddings.weight", "word_embeddings_layernorm.weight", "word_embeddings_layernorm.bias"},
            {"ln_f.weight", "ln_f.bias"},
            {"lm_head.weight"},
        ),
    ],
)
def test_parts_outside_the_blocks_are_told_apart_by_what_they_are_used_for(
    name: str, before: set[str], norms: set[str], head: set[str]
) -> None:
    names = names_of(empty(name))

    def ends(found: tuple[str, ...]) -> set[str]:
        return {".".join(one.split(".")[-2:]) for one in found}

    assert (ends(names.before), ends(names.final_norm), ends(names.head)) == (before, norms, head)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SUPPORTED]
)
def test_restoring_all_sites_is_the_base_to_the_bit(name: str) -> None:
    base, unlearned = build(name), build(name)
    change_weights(unlearned, scale=0.05)
    change_routers_buffers(unlearned)
    names = names_of(base)
    everything: dict[str, Any] = {}
    for place in ("before", *range(names.n_layers), "after"):
        everything |= names.at([*IN_BLOCK, "embed", "unembed"], place)  # type: ignore[arg-type]
    if name == "falcon h1":
        everything |= dict.fromkeys(one for one in names.all_names if ".mamba." in one)
    if name == "gemma 4":
        everything |= dict.fromkeys(names.all_names)
    assert set(everything) == set(names.all_names)
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6)}
    expected = run(base, inputs)
    assert not torch.equal(run(unlearned, inputs), expected)
    assert torch.equal(run(with_values(unlearned, restored_values(unlearned, base, everything)), inputs), expected)


@pytest.mark.parametrize("name", ["falcon, 7B", "falcon, grouped, one norm", "gpt-neox", "gpt-j", "bloom"])
def test_both_parts_of_the_base_make_the_base_s_step(name: str, tmp_path: Path) -> None:
    """Whatever a block adds up, what it adds is its two parts: an identity that no hook is needed for."""
    base, unlearned = build(name), build(name)
    change_weights(unlearned, lambda name: ".1." in name, scale=0.05)
    models = [Model.wrap(hf, build_tokenizer(), name="m") for hf in (base, unlearned)]
    item = Intervention(("attn_out", "mlp_out"), Window(1, (1,)))
    for engine in ("wavefront", "reference"):
        ((swept,),) = run_engine(engine, models, [build_batch(tmp_path, "left")], [item])
        assert float((swept.target - swept.base).abs().max()) > 1e-2
        assert_close(swept.intervened[0], swept.base, atol=5e-5)


def test_a_stray_field_of_another_family_changes_nothing() -> None:
    stray, plain = build("gpt-neox, a stray field"), build("gpt-neox")
    ours, theirs = names_of(stray), names_of(plain)
    for site in ("W_Q", "W_K", "W_V"):
        mine, other = ours.at([site], 1), theirs.at([site], 1)
        assert list(mine) == list(other) != []
        for rows, expected in zip(mine.values(), other.values(), strict=True):
            assert rows is not None and expected is not None and torch.equal(rows, expected)
    assert Model.wrap(stray, build_tokenizer(), name="stray").missing_sites == {}


@pytest.mark.parametrize("name", ["opt", "opt, narrow"])
def test_activations_are_there_whatever_the_width_of_the_mlp(name: str) -> None:
    assert not set(SITES) & set(Model.wrap(build(name), build_tokenizer(), name="opt").missing_sites)


OF_EXPERTS = {
    "mixtral": ("experts.down_proj", "experts.gate_up_proj", "gate.weight"),
    "qwen2 mixture": (
        "experts.down_proj shared_expert.down_proj.weight",
        "experts.gate_up_proj shared_expert.gate_proj.weight shared_expert.up_proj.weight",
        "gate.weight shared_expert_gate.weight",
    ),
    "gpt-oss, square": (
        "experts.down_proj experts.down_proj_bias",
        "experts.gate_up_proj experts.gate_up_proj_bias",
        "router.weight router.bias",
    ),
    "jet mixture": ("output_linear.weight bias", "input_linear.weight", "router.layer.weight"),
    "glm 4 mixture": (
        "experts.down_proj shared_experts.down_proj.weight",
        "experts.gate_up_proj shared_experts.gate_proj.weight shared_experts.up_proj.weight",
        "gate.weight gate.e_score_correction_bias",
    ),
    "ernie 4.5 mixture": (
        "experts.down_proj shared_experts.down_proj.weight",
        "experts.gate_up_proj shared_experts.gate_proj.weight shared_experts.up_proj.weight",
        "gate.weight gate.moe_statics.e_score_correction_bias",
    ),
    "afmoe": (
        "experts.down_proj shared_experts.down_proj.weight",
        "experts.gate_up_proj shared_experts.gate_proj.weight shared_experts.up_proj.weight",
        "router.gate.weight expert_bias",
    ),
    "minimax m2": ("experts.down_proj", "experts.gate_up_proj", "gate.weight e_score_correction_bias"),
    "llama 4": (
        "experts.down_proj shared_expert.down_proj.weight",
        "experts.gate_up_proj shared_expert.gate_proj.weight shared_expert.up_proj.weight",
        "router.weight",
    ),
    "gemma 4 mixture": (
        "experts.down_proj mlp.down_proj.weight",
        "experts.gate_up_proj mlp.gate_proj.weight mlp.up_proj.weight",
        "router.proj.weight router.scale router.per_expert_scale",
    ),
    "granite hybrid, attention alone": (
        "experts.down_proj shared_mlp.output_linear.weight",
        "experts.gate_up_proj shared_mlp.input_linear.weight",
        "router.weight",
    ),
}
"""By name of a configuration: value vectors, key vectors and router of layer 1, as the model's authors call them."""


def names_at(names: WeightNames, site: str, layer: int = 1) -> set[str]:
    prefix = rf"{re.escape(names.blocks)}\.{layer}\.((mlp|feed_forward|block_sparse_moe)\.(?!\w+_proj))?"
    return {re.sub(prefix, "", name) for name in names.at([site], layer)}


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_weights_of_experts_and_routers_are_found_by_structure(name: str) -> None:
    names = names_of(empty(name))
    found = [names_at(names, site) for site in ("value_vectors", "key_vectors", "router")]
    assert found == [set(text.split()) for text in OF_EXPERTS[name]]


@pytest.mark.parametrize("name", ["glm 4 mixture", "deepseek v3", "afmoe", "llama 4"])
def test_a_dense_layer_beside_mixtures_has_its_own_weights_and_no_router(name: str) -> None:
    names = names_of(empty(name))
    assert names_at(names, "value_vectors", 0) == {"mlp.down_proj.weight"} or name == "llama 4"
    assert {one.split(".")[-2] for one in names.at(["value_vectors"], 0)} == {"down_proj"}
    assert {one.split(".")[-2] for one in names.at(["key_vectors"], 0)} == {"gate_proj", "up_proj"}
    assert not names.at(["router"], 0) and names.at(["router"], 1)


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_a_correction_of_a_router_that_is_a_buffer_is_restored_with_it(engine: str, tmp_path: Path) -> None:
    base, unlearned = build("glm 4 mixture"), build("glm 4 mixture")
    change_routers_buffers(unlearned)
    models = [Model.wrap(hf, build_tokenizer(), name="m") for hf in (base, unlearned)]
    items = [Intervention((site,), Window(1, (0, 1, 2))) for site in ("router", "/correction/", "value_vectors")]
    ((swept,),) = run_engine(engine, models, [build_batch(tmp_path, "left")], items)
    assert float((swept.target - swept.base).abs().max()) > 1e-2
    for restored, expected in zip(swept.intervened, (swept.base, swept.base, swept.target), strict=True):
        assert_close(restored, expected, atol=5e-5)


class Mlp(nn.Module):
    def __init__(self, inner: int, gated: bool = True) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(32, inner, bias=False), nn.Linear(inner, 32)
        self.w3 = nn.Linear(32, inner, bias=False) if gated else None

    def forward(self, states: Tensor) -> Tensor:
        inner = nn.functional.silu(self.w1(states)) * (1 if self.w3 is None else self.w3(states))
        found: Tensor = self.w2(inner)
        return found


class SparseMlp(nn.Module):
    """A mixture whose experts are modules, as models of one's own have it."""

    def __init__(self, gated: bool = True, inner: int = 24) -> None:
        super().__init__()
        self.choice = nn.Linear(32, 4)
        self.many = nn.ModuleList(Mlp(inner, gated) for _ in range(4))
        self.always, self.how_much = Mlp(16, gated), nn.Linear(32, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        best = self.choice(states).softmax(-1).topk(2)
        weights = torch.zeros(*states.shape[:-1], 4).scatter(-1, best.indices, best.values)
        found: Tensor = self.how_much(states).sigmoid() * self.always(states)
        for index, expert in enumerate(self.many):
            found = found + weights[..., index, None] * expert(states)
        return found


def with_experts(name: str, **options: Any) -> Any:
    hf: Any = build(name)
    torch.manual_seed(0)
    for block in hf.transformer.h if name == "gpt-j" else hf.model.layers:
        block.mlp = SparseMlp(**options)
    return randomised(hf)


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("gpt-j", False),
        *[
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("gpt-j", True), ("mixtral", True), ("mixtral", False))
        ],
    ],
)
def test_experts_that_are_modules_have_weight_sites_in_sequential_and_parallel_blocks(
    name: str, gated: bool, tmp_path: Path
) -> None:
    hf = with_experts(name, gated=gated)
    names = names_of(hf)
    experts = [*(f"many.{index}" for index in range(4)), "always"]
    assert names_at(names, "value_vectors") == {f"{one}.w2.{end}" for one in experts for end in ("weight", "bias")}
    ups = ("w1", "w3") if gated else ("w1",)
    assert names_at(names, "key_vectors") == {f"{one}.{up}.weight" for one in experts for up in ups}
    assert names_at(names, "router") == {"choice.weight", "choice.bias", "how_much.weight"}
    assert "each expert reads the coefficients of its own tokens only; patch mlp_out" in names.refused["mlp_coef"]
    rows = {row.site: row for row in compare(hf, build_batch(tmp_path, "left"))}
    for site in ("mlp_out", "value_vectors", "key_vectors", "router"):
        assert rows[site].moved > 1e-4
        assert set(rows[site].gaps) == {"wavefront", "reference"} and max(rows[site].gaps.values()) < 1e-4
    assert set(rows) - {one for one, row in rows.items() if row.refused} == set(rows) - {"mlp_coef", "W_in", "W_gate"}


class TwoChoices(SparseMlp):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(32, 4)


class Odd(SparseMlp):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(32, 7)


@pytest.mark.parametrize(
    ("mlp", "what"),
    [
        (lambda: SparseMlp(gated=False, inner=32), "choice.weight"),  # up and down projections look alike
        (TwoChoices, "choice.weight"),
        (Odd, "odd.weight"),
    ],
)
def test_a_mixture_that_structure_does_not_tell_apart_is_refused_by_name(mlp: Any, what: str) -> None:
    hf: Any = build("mixtral")
    hf.model.layers[1].mlp = mlp()
    names = names_of(hf)
    for site in ("value_vectors", "key_vectors", "router"):
        assert f"model.layers.1.mlp.{what} is in this mixture of experts; restore it by name" in names.refused[site]
        assert not any(names.at([site], layer) for layer in range(3))
    assert names.at([f"/{what}/"], 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "the blocks of MixtralForCausalLM are mixtures of experts"),
        ("glm 4 mixture", "some blocks of Glm4MoeForCausalLM are mixtures of experts"),
        ("deepseek v3", "some blocks of DeepseekV3ForCausalLM are mixtures of experts"),
    ],
)
def test_sites_that_a_mixture_has_not_are_refused_with_the_reason_and_what_to_use(name: str, reason: str) -> None:
    names = names_of(empty(name))
    assert all(names.refused[site].startswith(reason) for site in ("mlp_coef", "W_in", "W_gate"))
    assert "stacked tensors" in names.refused["mlp_coef"] and "patch mlp_out" in names.refused["mlp_coef"]
    assert not {"value_vectors", "key_vectors", "router"} & set(names.refused)


def test_a_mixture_of_several_residual_streams_is_refused(tmp_path: Path) -> None:
    """DeepSeek V4: its blocks return several residual streams, and structure does not tell what mixes them."""
    _, fields = CONFIGURATIONS["deepseek v3"]
    config = AutoConfig.for_model("deepseek_v4", **{k: v for k, v in fields.items() if k != "first_k_dense_replace"})
    hf = randomised(AutoModelForCausalLM.from_config(config))
    names = names_of(hf)
    for site in ("value_vectors", "key_vectors", "router"):
        assert "_hc." in names.refused[site] and "restore it by name" in names.refused[site]
    with pytest.raises(InputError, match=r"resid_post of layer 0 has shape \(2, 6, 4, 32\)"):
        compare(hf, build_batch(tmp_path, "left"))


@pytest.mark.parametrize("name", ["gemma 4 mixture", "granite hybrid, attention alone"])
def test_an_mlp_is_not_the_output_where_experts_stand_beside_it(name: str) -> None:
    missing = Model.wrap(build(name), build_tokenizer(), name="m").missing_sites
    assert "beside an MLP" in missing["mlp_out"] and "mlp_out" not in missing["mlp_coef"]


def test_a_mixture_of_dense_layers_alone_has_value_vectors() -> None:
    names = names_of(empty("qwen3 mixture, all dense"))
    assert set(names.at(["value_vectors"], 1)) == {"model.layers.1.mlp.down_proj.weight"}
    assert "cannot be told from its other projections" in names.refused["W_in"]
