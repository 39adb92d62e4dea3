"""The canonical form: the same outputs, and one form for all ways in which a model's weights can be written."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import load_model
from dissect.models.canonical import STREAM_RMS, canonical, canonical_form
from dissect.models.model import Model
from dissect.models.rewriting import rewritten
from tests.dissect.helpers import change_weights
from tests.dissect.models.rewriting_helpers import FAMILIES, logit_gap, random_model, weight_gap

EXACT = 1e-12
"""Rounding of float64 weights."""


def unlearned_of(base: Model, *, scale: float = 0.02) -> Model:
    hf = copy.deepcopy(base.hf)
    change_weights(hf, scale=scale)
    return replace(base, name="unlearned", hf=hf, sha256="unlearned")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_canonical_form_has_the_same_outputs_and_is_its_own_form(family: str) -> None:
    model = random_model(family)
    form = canonical(model)
    assert logit_gap(model, form) < 1e-4
    assert weight_gap(model, form) > 0.5
    assert weight_gap(form, canonical(form)) < EXACT
    assert weight_gap(form, canonical(form, like=form)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rewriting_has_the_same_canonical_form(family: str, seed: int) -> None:
    model = random_model(family)
    assert weight_gap(canonical(model), canonical(rewritten(model, seed=seed))) < EXACT


@settings(max_examples=10, deadline=None)
@given(family=st.sampled_from(FAMILIES), seed=st.integers(2, 10**6), largest=st.sampled_from([1.0, 10.0, 100.0]))
def test_any_rewriting_of_any_family_has_the_same_canonical_form(family: str, seed: int, largest: float) -> None:
    model = random_model(family, seed=seed)
    other = rewritten(model, seed=seed, largest=largest)
    assert logit_gap(model, other) < 1e-4
    assert weight_gap(canonical(model), canonical(other)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rewritten_unlearned_model_is_matched_to_the_base(family: str) -> None:
    base = random_model(family)
    unlearned = unlearned_of(base)
    like = canonical(base)
    form = canonical(unlearned, like=like)
    assert logit_gap(unlearned, form) < 1e-4
    assert weight_gap(form, canonical(rewritten(unlearned, seed=5), like=like)) < EXACT
    # the update stays as small as it was, so units stand where the base's counterparts do
    assert weight_gap(like, form) < 0.6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "bloom"])
def test_float32_weights_have_the_same_form_up_to_their_rounding(family: str) -> None:
    model = random_model(family, dtype=torch.float32)
    like = canonical(model)
    other = canonical(rewritten(model, seed=0), like=like)
    assert logit_gap(model, other) < 1e-4
    assert weight_gap(like, other) < 1e-5


def test_every_freedom_is_fixed_as_stated() -> None:
    """By hand, for a Llama: gains, the embedding's scale, both sides of each channel, order and signs."""
    hf = canonical(random_model("llama", tied=False)).hf.requires_grad_(False)
    layer, embedding = hf.model.layers[0], hf.model.embed_tokens.weight
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, hf.model.norm):
        assert bool((norm.weight == 1).all())
    assert float(embedding.square().mean().sqrt()) == pytest.approx(STREAM_RMS, rel=1e-9)
    up, down, gate = (getattr(layer.mlp, f"{name}_proj").weight for name in ("up", "down", "gate"))
    torch.testing.assert_close(up.norm(dim=1), down.norm(dim=0))
    sizes = up.square().sum(1) + down.square().sum(0) + gate.square().sum(1)
    assert bool((sizes.diff() < 0).all())
    assert bool(((up**3).sum(1) > 0).all())
    q, k, v, o = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")
    of_group = o.view(32, 2, 2, 8)  # width, key-value head, query head, channel
    torch.testing.assert_close(v.view(2, 8, 32).norm(dim=2), of_group.norm(dim=(0, 2)))
    of_pairs = q.view(2, 2, 2, 4, 32)  # key-value head, query head, half, pair, width
    torch.testing.assert_close(of_pairs.square().sum((1, 2, 4)), k.view(2, 2, 4, 32).square().sum((1, 3)))


def test_gains_of_zero_and_channels_without_weights_stay() -> None:
    model = random_model("llama")
    with torch.no_grad():
        layer = model.hf.model.layers[0]
        layer.input_layernorm.weight[3] = 0
        layer.mlp.up_proj.weight[5] = 0
        layer.self_attn.v_proj.weight[2] = 0
    form = canonical(model)
    assert logit_gap(model, form) < 1e-4
    assert sorted(form.hf.model.layers[0].input_layernorm.weight.tolist()) == [0.0] + [1.0] * 31
    assert all(bool(values.isfinite().all()) for values in form.hf.parameters())
    assert weight_gap(form, canonical(form)) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_units_that_changed_places_are_counted(family: str) -> None:
    base = random_model(family)
    like = canonical_form(base)
    unlearned = unlearned_of(base, scale=0.005)
    assert not any(canonical_form(unlearned, like=like.model).moved(like).values())
    kinds = ("stream order", "heads", "query heads", "neurons", "experts")
    moved = canonical_form(rewritten(unlearned, seed=4, kinds=kinds), like=like.model).moved(like)
    assert moved["stream order"] > 20 and moved["neurons"] > 80 and moved["query heads"] > 0 and moved["heads"] > 0


def test_the_bridge_computes_what_the_canonical_model_computes() -> None:
    """TransformerLens takes a norm's epsilon from the configuration in some families."""
    ids = torch.arange(1, 13).view(2, 6)
    for family in ("gpt2", "bloom", "falcon", "gptj", "llama"):
        model = canonical(random_model(family, dtype=torch.float32))
        with torch.no_grad():
            plain = model.hf(ids).logits
            bridged = model.bridge(ids, return_type="logits")
        assert float((plain - bridged).abs().max() / plain.std()) < 1e-4, family


@pytest.mark.parametrize("factor", [100.0, 1 / 30])
def test_gains_against_matrices_by_hand_on_the_demo_s_base(factor: float) -> None:
    """The rewriting that made a verdict say erased instead of suppressed, without `rewritten`."""
    base = load_model("demo:base", device="cpu")
    hf = copy.deepcopy(base.hf)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm.weight.mul_(factor)
            layer.post_attention_layernorm.weight.mul_(factor)
            attention, mlp = layer.self_attn, layer.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight.div_(factor)
    other = replace(base, hf=hf)
    like = canonical(base)
    assert weight_gap(base, other) > 0.9
    assert weight_gap(like, canonical(other, like=like)) < 1e-5
    assert logit_gap(base, canonical(other, like=like)) < 1e-4
