"""The reference engine against plain torch hooks on the untouched Hugging Face model, and by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dissect import load_prompts
from dissect.engine.reference import hook_points, record, scored_logits, sweep
from dissect.interventions import Intervention, Window
from dissect.pairs import Model, ModelPair
from dissect.prompts import Batch
from dissect.recovery import knowledge_recovery_score, logit_mse
from dissect.sites import SITES
from tests.dissect.helpers import (
    RECORDS,
    PlainPatcher,
    assert_close,
    build_model,
    build_pair,
    build_tokenizer,
    save_records,
)

FAMILIES = ["llama", "neox", "gpt2", "gemma2", "olmo2", "phi3", "qwen3", "mistral"]
SITE_SETS = [(site,) for site in SITES] + [("mlp_coef", "attn_out"), ("attn_out", "mlp_out")]
WINDOWS = [Window(0, 0, 0), Window(1, 1, 1), Window(2, 1, 2), Window(1, 0, 2)]
INTERVENTIONS = [Intervention("patch", sites, window) for sites in SITE_SETS for window in WINDOWS]


def build_batch(tmp_path: Path, side: Any) -> Batch:
    prompts = load_prompts(save_records(tmp_path / "prompts.json", RECORDS), build_tokenizer())
    (batch,) = prompts.batches(len(prompts), padding_side=side)
    assert (batch.attention_mask == 0).any()
    return batch


def plain_inputs(pair: ModelPair, batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if pair.base.takes_position_ids and batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_intervention_equals_plain_hooks_on_the_hugging_face_model(
    family: str, side: str, tmp_path: Path
) -> None:
    pair, batch = build_pair(family), build_batch(tmp_path, side)
    assert pair.base.missing_sites == {}
    oracle = PlainPatcher(pair.base.hf, pair.unlearned.hf, plain_inputs(pair, batch))
    logits = sweep(pair.base, pair.unlearned, batch, INTERVENTIONS)

    def scored(all_logits: Tensor) -> Tensor:
        return all_logits[batch.rows, batch.columns]

    assert_close(logits.base, scored(oracle.base_logits()), atol=2e-5)
    assert_close(logits.target, scored(oracle.logits()), atol=2e-5)
    for intervention, patched in zip(INTERVENTIONS, logits.intervened, strict=True):
        expected = scored(oracle.logits(intervention.sites, intervention.window.layers))
        assert_close(patched, expected, atol=2e-5)
        moved = float((expected - logits.target).abs().max())
        assert moved > 1e-2, f"{intervention.label} does too little to be compared"


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_patching_a_model_with_its_own_activations_changes_no_bit(family: str, tmp_path: Path) -> None:
    pair, batch = build_pair(family), build_batch(tmp_path, "left")
    logits = sweep(pair.unlearned, pair.unlearned, batch, INTERVENTIONS)
    assert torch.equal(logits.base, logits.target)
    for patched in logits.intervened:
        assert torch.equal(patched, logits.target)


def torch_hooks(model: Model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for tree in (model.hf, model.bridge)
        for module in tree.modules()
    )


def test_no_hook_outlives_a_run(tmp_path: Path) -> None:
    pair, batch = build_pair("llama"), build_batch(tmp_path, "right")
    before = torch_hooks(pair.unlearned)
    plain = scored_logits(pair.unlearned, batch, [])
    patched = list(sweep(pair.base, pair.unlearned, batch, INTERVENTIONS).intervened)
    assert not torch.equal(patched[0], plain)
    assert torch_hooks(pair.unlearned) == before
    assert torch.equal(scored_logits(pair.unlearned, batch, []), plain)


def test_no_hook_outlives_an_exception_in_a_hook(tmp_path: Path) -> None:
    model, batch = build_pair("neox").unlearned, build_batch(tmp_path, "right")
    before, plain = torch_hooks(model), scored_logits(model, batch, [])
    ran = []

    def zero(activation: Tensor, hook: Any) -> Tensor:
        ran.append(hook.name)
        return torch.zeros_like(activation)

    def fail(_activation: Tensor, hook: Any) -> Tensor:
        raise RuntimeError(f"in {hook.name}")

    early, late = SITES["mlp_coef"].hook_name(0), SITES["mlp_coef"].hook_name(1)
    with pytest.raises(RuntimeError, match="in blocks.1"):
        scored_logits(model, batch, [(early, zero), (late, fail)])
    assert ran == [early]
    assert torch_hooks(model) == before
    assert torch.equal(scored_logits(model, batch, []), plain)


def test_recorded_activations_are_copies_that_later_code_cannot_overwrite(tmp_path: Path) -> None:
    model, batch = build_pair("llama").base, build_batch(tmp_path, "right")
    points = hook_points(Intervention("patch", ("resid_post",), Window(1, 0, 2)))
    _, plain = record(model, batch, points)
    assert list(plain) == points

    def overwrite(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        activation.zero_()

    # What runs next writes into the very tensor that the hook was given.
    model.bridge.add_hook("ln_final.hook_in", overwrite, is_permanent=True)
    _, overwritten = record(model, batch, points)
    for name in points:
        assert torch.equal(plain[name], overwritten[name])


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_the_hugging_face_model_stays_as_it_was(family: str, tmp_path: Path) -> None:
    batch, hf = build_batch(tmp_path, "right"), build_model(family)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        before = hf(**inputs).logits
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in hf.state_dict().items()}
    modules = [(name, type(module)) for name, module in hf.named_modules()]
    attention = hf.config._attn_implementation
    model = Model.wrap(hf, build_tokenizer(), name=family)
    list(sweep(model, model, batch, INTERVENTIONS[:6]).intervened)
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


def test_a_micro_model_gives_what_is_worked_out_by_hand() -> None:
    """Norm of [1, -1] is itself and relu(gate x) is [1, 1], so the coefficients are up x.

    base       coefficients [6, 2], MLP [6, 2], residual [7, 1], final norm x 5 = [7, 1], logits [7, 1, 8]
    unlearned  coefficients [0, 2], MLP [0, 2], residual [1, 1], final norm x 5 = [5, 5], logits [5, 5, 10]
    mlp_coef   coefficients [6, 2], MLP [0, 8], residual [1, 7], final norm x 5 = [1, 7], logits [1, 7, 8]
    KRS of mlp_coef = 1 - ((36 + 36 + 0) / 3) / ((4 + 16 + 4) / 3) = 1 - 24 / 8 = -2
    """
    tokenizer = build_tokenizer()
    base = Model.wrap(build_micro_llama([[6, 0], [0, -2]], [[1, 0], [0, 1]]), tokenizer, name="base")
    unlearned = Model.wrap(build_micro_llama([[0, 0], [0, -2]], [[0, 0], [1, 1]]), tokenizer, name="unlearned")
    batch = Batch(
        examples=(0,),
        input_ids=torch.tensor([[0, 1, 2]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        position_ids=torch.arange(3)[None],
        rows=torch.tensor([0]),
        columns=torch.tensor([1]),
        next_tokens=torch.tensor([2]),
    )
    sites = [("mlp_coef",), ("attn_out",), ("mlp_out",), ("resid_post",)]
    logits = sweep(base, unlearned, batch, [Intervention("patch", site, Window(0, 0, 0)) for site in sites])
    coef, attn, mlp, resid = logits.intervened
    assert_close(logits.base, torch.tensor([[7.0, 1.0, 8.0]]), atol=1e-5)
    assert_close(logits.target, torch.tensor([[5.0, 5.0, 10.0]]), atol=1e-5)
    assert_close(coef, torch.tensor([[1.0, 7.0, 8.0]]), atol=1e-5)
    assert_close(attn, torch.tensor([[5.0, 5.0, 10.0]]), atol=1e-5)
    assert_close(mlp, torch.tensor([[7.0, 1.0, 8.0]]), atol=1e-5)
    assert_close(resid, torch.tensor([[7.0, 1.0, 8.0]]), atol=1e-5)
    krs = knowledge_recovery_score(logit_mse(logits.base, coef), logit_mse(logits.base, logits.target))
    assert_close(krs, torch.tensor([-2.0]), atol=1e-5)
