"""Every engine against plain torch hooks on the untouched Hugging Face model, and by hand; nothing is left behind."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dissect.engine import ENGINES, find_engine
from dissect.engine.chunk import Chunk
from dissect.engine.layers import InMemory
from dissect.engine.reference import scored_logits
from dissect.interventions.donors import own_activations
from dissect.interventions.intervention import Intervention
from dissect.interventions.intervention import sweep as all_in
from dissect.interventions.windows import Window, prefix_windows, suffix_windows
from dissect.models.model import Model
from dissect.models.sites import SITES, WEIGHT_SITES, is_weight
from dissect.prompts.prompts import Batch
from dissect.scoring.recovery import knowledge_recovery_score, logit_mse
from tests.dissect.helpers import (
    PlainPatcher,
    assert_close,
    build_batch,
    build_model,
    build_pair,
    build_tokenizer,
    decoder_blocks,
    plain_inputs,
    run_engine,
    torch_state,
)
from unlearning.common.errors import InputError

FAMILIES = ["llama", "neox", "gpt2", "gemma2", "olmo2", "phi3", "qwen3", "mistral"]
PATCHES = [(site,) for site in SITES] + [("mlp_coef", "attn_out"), ("attn_out", "mlp_out")]
RESTORES = [("value_vectors",), ("attn_out", "value_vectors"), ("mlp_coef", "value_vectors")]
WEIGHTS = [
    *[(site,) for site in WEIGHT_SITES],
    *[("/q_proj|query_key_value|c_attn/",), (r"/\.1\..*weight/",), ("/norm|ln_|embed|wte/",), ("/./",)],
    *[("attn_out", "key_vectors"), ("W_V", "W_O"), ("mlp_coef", "value_vectors", "norms")],
    *[("attn_weights", "embed"), ("mlp_out", "unembed"), ("value_vectors", "/norm/")],
]
"""Every weight site, expressions, and weights together with activations."""
WINDOWS = [Window(0, (0,)), Window(1, (1,)), Window(2, (1, 2)), Window(1, (0, 1, 2))]
INTERVENTIONS = [Intervention(sites, window) for sites in PATCHES for window in WINDOWS] + [
    Intervention(sites, window) for sites in RESTORES for window in WINDOWS
]


def test_an_unknown_engine_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="engine.*wavefront, reference.*hooks"):
        find_engine("hooks")


@pytest.mark.parametrize(
    ("family", "side"),
    [
        *[(family, "left") for family in FAMILIES],
        *[pytest.param(family, "right", marks=[] if family == "neox" else pytest.mark.slow) for family in FAMILIES],
    ],
)
def test_every_intervention_equals_plain_hooks_on_the_hugging_face_model(
    family: str, side: str, tmp_path: Path
) -> None:
    pair, batch = build_pair(family), build_batch(tmp_path, side)
    assert pair.base.missing_sites == {}
    oracle = PlainPatcher(pair.base.hf, pair.unlearned.hf, plain_inputs(pair.base, batch))

    def scored(all_logits: Tensor) -> Tensor:
        return all_logits[batch.rows, batch.columns]

    base, target = scored(oracle.base_logits()), scored(oracle.logits())
    expected = [scored(oracle.logits(item.sites, item.window.layers)) for item in INTERVENTIONS]
    for intervention, logits in zip(INTERVENTIONS, expected, strict=True):
        moved = float((logits - target).abs().max())
        assert moved > 1e-2, f"{intervention.label} does too little to be compared"
    for engine in ENGINES:
        ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], INTERVENTIONS)
        assert_close(swept.base, base, atol=2e-5)
        assert_close(swept.target, target, atol=2e-5)
        for ours, theirs in zip(swept.intervened, expected, strict=True):
            assert_close(ours, theirs, atol=3e-5)


def existing(model: Model, site_sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those whose weights the architecture has."""
    places: list[Any] = [*range(model.n_layers), "before", "after"]
    return [
        sites
        for sites in site_sets
        if all(any(model.weights.at([site], place) for place in places) for site in sites if is_weight(site))
    ]


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *[("llama", False), ("gpt2", True), ("phi3", False)],
        *[pytest.param(family, True, marks=pytest.mark.slow) for family in ("llama", "neox")],
        *[
            pytest.param(family, False, marks=pytest.mark.slow)
            for family in ("gpt2", "neox", "gemma2", "olmo2", "qwen3", "mistral", "qwen2", "olmo")
        ],
    ],
)
def test_restored_weights_equal_a_copy_that_they_were_written_into(family: str, tied: bool, tmp_path: Path) -> None:
    """Every weight site, alone and with activations, with a gap in the window and at its end; engines in turn."""
    pair, batch = build_pair(family, tied=tied), build_batch(tmp_path, "left")
    oracle = PlainPatcher(pair.base.hf, pair.unlearned.hf, plain_inputs(pair.base, batch))
    windows = [Window(2, (0, 2)), prefix_windows(3)[1], suffix_windows(3)[1]]
    items = all_in(existing(pair.base, WEIGHTS), windows, pair.base.weights)
    assert {item.kind for item in items} == {"restore"}
    lacking = {"gpt2": {"W_gate"}, "neox": {"W_gate"}, "olmo": {"norms"}}.get(family, set())
    assert set(WEIGHT_SITES) - {site for item in items for site in item.sites} == lacking | {"router"}

    def scored(all_logits: Tensor) -> Tensor:
        return all_logits[batch.rows, batch.columns]

    target = scored(oracle.logits())
    expected = [scored(oracle.logits(item.sites, item.window.layers)) for item in items]
    for intervention, logits in zip(items, expected, strict=True):
        moved = float((logits - target).abs().max())
        assert moved > 1e-3, f"{intervention.label} does too little to be compared"
    for engine, step in (("wavefront", 1), ("reference", 2)):
        ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], items[::step])
        for intervention, ours, theirs in zip(items[::step], swept.intervened, expected[::step], strict=True):
            gap = float((ours - theirs).abs().max())
            assert gap < 5e-5, f"{engine}: {intervention.label} is {gap:.1g} away"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_patching_a_model_with_its_own_activations_changes_nothing(family: str, engine: str, tmp_path: Path) -> None:
    """No bit in the reference engine; the wavefront multiplies other shapes and so rounds otherwise."""
    pair, batch = build_pair(family, dtype=torch.float64), build_batch(tmp_path, "right")
    ((swept,),) = run_engine(engine, [pair.unlearned, pair.unlearned], [batch], INTERVENTIONS)
    for logits in (swept.base, *swept.intervened):
        assert_close(logits, swept.target, atol=0 if engine == "reference" else 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_nothing_outlives_a_run(family: str, engine: str, tmp_path: Path) -> None:
    pair, batch = build_pair(family), build_batch(tmp_path, "right")
    before = [torch_state(model) for model in (pair.base, pair.unlearned)]
    plain = scored_logits(pair.unlearned, batch, [])
    ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], INTERVENTIONS)
    assert not torch.equal(swept.intervened[0], plain)
    assert [torch_state(model) for model in (pair.base, pair.unlearned)] == before
    assert torch.equal(scored_logits(pair.unlearned, batch, []), plain)


class OnFireError(Exception):
    """What no engine expects."""


FAILING: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    "embedding": lambda hf: hf.get_input_embeddings(),
    "first block": lambda hf: decoder_blocks(hf)[0],
    "last block": lambda hf: decoder_blocks(hf)[2],
    "attention": lambda hf: decoder_blocks(hf)[1].self_attn,
    "query projection": lambda hf: decoder_blocks(hf)[1].self_attn.q_proj,
    "output projection of the last block": lambda hf: decoder_blocks(hf)[2].self_attn.o_proj,
    "MLP": lambda hf: decoder_blocks(hf)[1].mlp,
    "down projection of the first block": lambda hf: decoder_blocks(hf)[0].mlp.down_proj,
    "final norm": lambda hf: hf.model.norm,
    "head": lambda hf: hf.get_output_embeddings(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("which", [pytest.param("base", marks=pytest.mark.slow), "unlearned"])
@pytest.mark.parametrize("place", FAILING)
def test_nothing_outlives_an_exception(place: str, which: str, engine: str, tmp_path: Path) -> None:
    """Whatever module fails, in the first call of it and in the second."""
    pair, batch = build_pair("llama"), build_batch(tmp_path, "right")
    models = [pair.base, pair.unlearned]
    before = [torch_state(model) for model in models]
    plain = scored_logits(pair.unlearned, batch, [])
    module = FAILING[place](getattr(pair, which).hf)
    for calls_before in (0, 1):
        calls = []

        def fail(*_arguments: Any, calls: list[int] = calls, calls_before: int = calls_before) -> None:
            calls.append(1)
            if len(calls) > calls_before:
                raise OnFireError

        handle = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(OnFireError):
                run_engine(engine, models, [batch, batch], INTERVENTIONS, chunk_tokens=1)
        finally:
            handle.remove()
        assert len(calls) == calls_before + 1
        assert [torch_state(model) for model in models] == before
        assert torch.equal(scored_logits(pair.unlearned, batch, []), plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sweep_that_is_not_read_to_its_end_leaves_nothing_behind(engine: str, tmp_path: Path) -> None:
    pair, batch = build_pair("llama"), build_batch(tmp_path, "right")
    models = [pair.base, pair.unlearned]
    before = [torch_state(model) for model in models]
    layers, donor = InMemory(models), own_activations(pair.base)
    sweeps = find_engine(engine)(layers, [batch, batch], INTERVENTIONS, donor, Chunk(600), lambda _share: None)
    (first,) = next(sweeps)
    next(first.intervened)
    assert [torch_state(model) for model in models] == before
    sweeps.close()  # type: ignore[attr-defined]
    assert [torch_state(model) for model in models] == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_the_hugging_face_model_stays_as_it_was(family: str, engine: str, tmp_path: Path) -> None:
    batch, hf = build_batch(tmp_path, "right"), build_model(family)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        before = hf(**inputs).logits
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in hf.state_dict().items()}
    modules = [(name, type(module)) for name, module in hf.named_modules()]
    attention = hf.config._attn_implementation
    model = Model.wrap(hf, build_tokenizer(), name=family)
    run_engine(engine, [model, model], [batch], INTERVENTIONS[::5])
    with torch.no_grad():
        assert torch.equal(hf(**inputs).logits, before)
    assert [(name, type(module)) for name, module in hf.named_modules()] == modules
    assert hf.config._attn_implementation == attention
    after = hf.state_dict()
    assert list(after) == list(state)
    for name, tensor in after.items():
        assert tensor.data_ptr() == state[name][0], name
        assert torch.equal(tensor, state[name][1]), name
    # The bridge sees the very same memory; TransformerLens copies only a fused QKV, to split it into q, k and v.
    ours = {parameter.data_ptr() for parameter in hf.parameters()}
    theirs = {parameter.data_ptr(): name for name, parameter in model.bridge.named_parameters()}
    assert ours <= set(theirs)
    copies = [name for pointer, name in theirs.items() if pointer not in ours]
    if family == "llama":
        assert copies == []
    assert all(re.search(r"\.(attn|attention)\.[qkv]\.", name) for name in copies), copies


@pytest.mark.parametrize("engine", ENGINES)
def test_the_shares_of_the_work_add_up_to_all_of_it(engine: str, tmp_path: Path) -> None:
    pair, batch = build_pair("llama"), build_batch(tmp_path, "right")
    shares: list[float] = []
    models = InMemory([pair.base, pair.unlearned, pair.unlearned])
    sweep = find_engine(engine)
    for by_target in sweep(
        models, batch.pieces(2), INTERVENTIONS[:7], own_activations(pair.base), Chunk(30), shares.append
    ):
        for swept in by_target:
            list(swept.intervened)
    assert len(shares) > 1 and min(shares) > 0
    assert_close(sum(shares), 1.0, atol=1e-9)


def build_micro_llama(up: list[list[float]], down: list[list[float]]) -> LlamaForCausalLM:
    """One layer of width 2, no attention output, relu(gate x) * (up x), every token embedded as [1, -1]."""
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="relu",
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        max_position_embeddings=8,
    )
    model = LlamaForCausalLM(config).eval()
    block = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, -1.0]] * 3))
        block.self_attn.o_proj.weight.zero_()
        block.mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        block.mlp.up_proj.weight.copy_(torch.tensor(up))
        block.mlp.down_proj.weight.copy_(torch.tensor(down))
        model.model.norm.weight.fill_(5.0)
        model.lm_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_a_micro_model_gives_what_is_worked_out_by_hand(engine: str) -> None:
    """Norm of [1, -1] is itself and relu(gate x) is [1, 1], so the coefficients are up x.

    base           coefficients [2, 2], MLP [6, 2], residual [7, 1], final norm x 5 = [7, 1], logits [7, 1, 8]
    unlearned      coefficients [0, 2], MLP [0, 2], residual [1, 1], final norm x 5 = [5, 5], logits [5, 5, 10]
    mlp_coef       coefficients [2, 2], MLP [0, 8], residual [1, 7], final norm x 5 = [1, 7], logits [1, 7, 8]
    value_vectors  coefficients [0, 2], MLP [6, 0], residual [7, -1], final norm x 5 = [7, -1], logits [7, -1, 6]
    KRS of mlp_coef = 1 - ((36 + 36 + 0) / 3) / ((4 + 16 + 4) / 3) = 1 - 24 / 8 = -2
    KRS of value_vectors = 1 - ((0 + 4 + 4) / 3) / 8 = 2 / 3
    """
    tokenizer = build_tokenizer()
    base = Model.wrap(build_micro_llama([[2, 0], [0, -2]], [[0, 3], [1, 0]]), tokenizer, name="base")
    unlearned = Model.wrap(build_micro_llama([[0, 0], [0, -2]], [[0, 0], [3, 1]]), tokenizer, name="unlearned")
    batch = Batch(
        examples=(0,),
        input_ids=torch.tensor([[0, 1, 2]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        position_ids=torch.arange(3)[None],
        rows=torch.tensor([0]),
        columns=torch.tensor([1]),
        next_tokens=torch.tensor([2]),
    )
    expected = {
        ("mlp_coef",): [1.0, 7.0, 8.0],
        ("attn_out",): [5.0, 5.0, 10.0],
        ("mlp_out",): [7.0, 1.0, 8.0],
        ("resid_post",): [7.0, 1.0, 8.0],
        ("value_vectors",): [7.0, -1.0, 6.0],
        ("mlp_coef", "value_vectors"): [7.0, 1.0, 8.0],
        ("attn_out", "value_vectors"): [7.0, -1.0, 6.0],
    }
    interventions = [Intervention(sites, Window(0, (0,))) for sites in expected]
    ((swept,),) = run_engine(engine, [base, unlearned], [batch], interventions)
    assert_close(swept.base, torch.tensor([[7.0, 1.0, 8.0]]), atol=1e-5)
    assert_close(swept.target, torch.tensor([[5.0, 5.0, 10.0]]), atol=1e-5)
    for logits, by_hand in zip(swept.intervened, expected.values(), strict=True):
        assert_close(logits, torch.tensor([by_hand]), atol=1e-5)
    before = logit_mse(swept.base, swept.target)
    scores = [knowledge_recovery_score(logit_mse(swept.base, logits), before) for logits in swept.intervened]
    assert_close(torch.cat(scores), torch.tensor([-2, 0, 1, 1, 2 / 3, 1, 2 / 3]), atol=1e-5)
