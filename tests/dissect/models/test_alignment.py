"""Models that are written in another basis: found, refused, and put back, to the bit but for scales."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import behave, decompose, load_pair, load_prompts, patch, probe, restore
from dissect.models.alignment import _known, aligned, check_basis, find_differences
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.rewriting import rewritten
from dissect.zoo import BUILTIN, question_set
from tests.dissect.families import build
from tests.dissect.helpers import build_prompts, build_tokenizer, change_weights
from tests.dissect.models.rewriting_helpers import logit_gap, weight_gap
from tests.dissect.stress.constructed import model
from unlearning import InputError
from unlearning.checkpoints.hashing import content_hash

ORDERS = ("neurons", "heads", "query heads", "stream order")
SIGNS = ("mlp", "value", "query", "norm", "stream signs")
SCALES = ("mlp", "value", "query", "stream")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.hf.parameters(), other.hf.parameters(), strict=True))


def moved(seed, *kinds, largest=1.0):
    return rewritten(model("demo:npo"), seed=seed, largest=largest, kinds=kinds)


def changed(of, act, name="changed"):
    """A copy of a model that a function has changed."""
    hf = copy.deepcopy(of.hf)
    with torch.no_grad():
        act(hf)
    return replace(of, name=name, hf=hf, sha256=content_hash(hf, name=name))


def pairs():
    for name in BUILTIN:
        base = f"{name.partition(':')[0]}:base"
        yield pytest.param(base, name, marks=[] if base == "demo:base" else [pytest.mark.slow])


@pytest.mark.parametrize(("base", "name"), pairs())
def test_fine_tuned_models_have_the_bases_basis(base, name):
    """Also RMU, which moves single matrices far, and the control, which was trained apart from the base."""
    assert find_differences(model(base), model(name)) == []
    assert aligned(model(base), model(name)) is model(name)


@pytest.mark.parametrize(
    ("what", "kind"), [*(("order", kind) for kind in ORDERS), *(("signs", kind) for kind in SIGNS)]
)
def test_other_orders_and_signs_are_found_and_undone_to_the_bit(what, kind):
    base, other = model("demo:base"), moved(1, kind)
    assert [(one.what, one.kind) for one in find_differences(base, other)] == [(what, kind)]
    with pytest.raises(InputError, match=f"another basis than demo:base .{what} of the .*Set `align`"):
        check_basis(base, other)
    back = aligned(base, other)
    assert same(back, model("demo:npo")) and not same(other, model("demo:npo"))
    assert back.sha256 == model("demo:npo").sha256
    check_basis(base, back)


@pytest.mark.parametrize("kind", ["norm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SCALES)])
def test_other_scales_are_found_and_undone_as_far_as_training_lets_them_be_known(kind):
    base, npo, other = model("demo:base"), model("demo:npo"), moved(1, kind, largest=100.0)
    assert ("scales", kind) in [(one.what, one.kind) for one in find_differences(base, other)]
    back = aligned(base, other)
    assert logit_gap(npo, back) < 1e-4 and find_differences(base, back) == []
    assert weight_gap(back, npo) < 0.05 < 0.4 < weight_gap(other, npo)


@settings(max_examples=2, deadline=None)
@given(st.sets(st.sampled_from(sorted({*ORDERS, *SIGNS})), min_size=1), st.integers(0, 1000))
def test_several_orders_and_signs_at_once_are_undone(kinds, seed):
    assert same(aligned(model("demo:base"), moved(seed, *sorted(kinds))), model("demo:npo"))


def test_everything_at_once_is_undone():
    base, npo, other = model("demo:base"), model("demo:npo"), rewritten(model("demo:npo"), seed=2)
    back = aligned(base, other)
    assert logit_gap(npo, back) < 1e-4
    assert weight_gap(back, npo) < 0.5 and find_differences(base, back) == []


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_a_part_of_the_neurons_of_some_layers_is_enough(share, layers):
    base, tuned = tiny()

    def act(hf):
        for layer in layers:
            mlp = hf.model.layers[layer].mlp
            order = torch.arange(mlp.down_proj.in_features)
            chosen = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))[: int(share * len(order))]
            order[chosen] = chosen.roll(1)
            for matrix in (mlp.gate_proj, mlp.up_proj):
                matrix.weight.copy_(matrix.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])

    other = changed(tuned, act)
    (found,) = find_differences(base, other)
    assert str(found) == f"order of the MLP neurons of {len(layers)} layer{'s' * (len(layers) > 1)}"
    assert same(aligned(base, other), tuned)


@cache
def tiny():
    """A base of width 64, its weights of standard deviation 0.2, and the same model after noise on every weight."""
    base = Model.wrap(build("llama", hidden_size=64, intermediate_size=128), build_tokenizer(), name="base")
    return base, changed(base, lambda hf: change_weights(hf, scale=0.05))


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("neurons", "mlp_coef"),
        ("mlp", "mlp_coef"),
        ("value", "attn_weights"),
        ("query", "attn_weights"),
        ("stream signs", "resid_post"),
        ("stream signs", "value_vectors"),
        ("stream order", "attn_out"),
        ("norm", "key_vectors"),
    ],
)
@pytest.mark.parametrize("largest", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_sweeps_refuse_another_basis_and_give_the_same_numbers_once_it_is_undone(kind, site, largest, tmp_path):
    base, tuned = tiny()
    other = rewritten(tuned, seed=3, largest=largest, kinds=[kind])
    prompts = build_prompts(tmp_path)
    sweep = patch if site in ("mlp_coef", "attn_out", "resid_post") else restore

    def krs(of):
        options = {"sites": [site], "window": 1, "control": None, "progress": False}
        return torch.tensor(sweep(ModelPair(base, of), prompts, **options).frame["krs"].to_numpy())

    with pytest.raises(InputError, match="another basis"):
        krs(other)
    gap = float((krs(aligned(base, other)) - krs(tuned)).abs().max())
    assert gap < (1e-3 if largest == 1 or kind in (*ORDERS, "stream signs") else 0.1)


def test_every_command_refuses_another_order_and_agrees_once_it_is_undone():
    base, npo, other = model("demo:base"), model("demo:npo"), moved(3, "neurons")
    pair = load_pair("demo:base", "demo:npo")
    prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=6)
    retain = load_prompts(question_set("retain"), pair.tokenizer, limit=3)
    broken, whole = ModelPair(base, other), ModelPair(base, npo)
    for act in (
        lambda: patch(broken, prompts, sites=["mlp_coef"], control=None, progress=False),
        lambda: patch(whole, prompts, sites=["mlp_coef"], control=other, progress=False),
        lambda: decompose(broken, prompts, control=None, progress=False),
        lambda: probe(broken, prompts, control=None, draws=1, progress=False),
        lambda: behave(broken, prompts, retain, control=None, progress=False),
        lambda: behave(whole, prompts, retain, control=other, progress=False),
    ):
        with pytest.raises(InputError, match="order of the MLP neurons of 8 layers"):
            act()
    mended = ModelPair(base, aligned(base, other))
    found, wanted = (
        patch(one, prompts, sites=["mlp_coef"], control=None, progress=False).frame["krs"] for one in (mended, whole)
    )
    assert found.tolist() == wanted.tolist()
    found, wanted = (
        behave(one, prompts, retain, control=None, max_new_tokens=2, progress=False).coefficients["cosine"]
        for one in (mended, whole)
    )
    assert found.tolist() == wanted.tolist()


def reinitialised(std=None):
    """The fine-tuned model with the MLP of one layer, and its norm, drawn anew."""

    def act(hf):
        generator = torch.Generator().manual_seed(9)
        block = hf.model.layers[1]
        block.post_attention_layernorm.weight.fill_(1.0)
        for parameter in block.mlp.parameters():
            size = float(parameter.std()) if std is None else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)

    return act


@pytest.mark.parametrize("std", [None, 1e-3, 1.0])
@pytest.mark.parametrize("of", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_a_layer_that_was_drawn_anew_is_no_other_basis(of, std):
    base, tuned = tiny() if of == "tiny" else (model("demo:base"), model("demo:npo"))
    check_basis(base, changed(tuned, reinitialised(std)))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_noise_as_large_as_the_weights_is_no_other_basis(scale):
    base, tuned = tiny()
    check_basis(base, changed(tuned, lambda hf: change_weights(hf, scale=0.2 * scale, seed=5)))


def test_one_side_that_training_scaled_is_no_other_basis():
    base, tuned = tiny()

    def act(hf):
        for block in hf.model.layers:
            block.mlp.down_proj.weight.mul_(3)
            block.self_attn.v_proj.weight.mul_(-0.5)

    check_basis(base, changed(tuned, act))


@pytest.mark.parametrize("cosine", [0.6, 0.7, 0.8])
def test_long_training_that_turns_every_matrix_and_keeps_its_size_is_no_other_scale(cosine):
    base = model("demo:base")

    def act(hf):
        generator = torch.Generator().manual_seed(3)
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                noise -= parameter * (noise * parameter).sum() / parameter.square().sum()
                noise *= parameter.norm() / noise.norm()
                parameter.copy_(cosine * parameter + (1 - cosine**2) ** 0.5 * noise)

    check_basis(base, changed(base, act))


def test_models_that_have_nothing_in_common_are_not_called_rewritten():
    base = model("demo:base")
    assert find_differences(base, fresh(base)) == []
    assert find_differences(fresh(base), base) == []


def fresh(like):
    """A model of another initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        hf = type(like.hf)(like.hf.config).eval()
    return replace(like, name="fresh", hf=hf, sha256=content_hash(hf, name="fresh"))


def test_a_pair_is_asked_once():
    base, npo = model("demo:base"), model("demo:npo")
    find_differences(base, npo)
    found = find_differences(base, npo)
    found.append("edited")
    assert find_differences(base, npo) == [] and (base.sha256, npo.sha256) in _known
