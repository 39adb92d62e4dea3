"""Weight sites: every parameter has its place, and what is restored is the base's and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.pair import ModelPair
from dissect.models.parameter_swap import restored_values
from dissect.models.weights import ParameterRows, find_weights
from tests.dissect.helpers import build_pair, torch_state

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "olmo", "olmo2", "gemma2", "phi3", "opt", "falcon"]
DENSE += ["bloom", "gptj"]
FUSED = ["gpt2", "neox", "phi3", "falcon", "bloom"]
IN_BLOCK = ("attn_weights", "key_vectors", "value_vectors", "norms")
PIECES = {"attn": ("W_Q", "W_K", "W_V"), "mlp": ("W_gate", "W_in")}


def weights_of(model: Model) -> Any:
    return find_weights(model.hf, model.anatomy, model.adapter)


def restored(pair: ModelPair, chosen: ParameterRows) -> Any:
    """The unlearned model with the base's values there."""
    return with_values(pair.unlearned.hf, restored_values(pair.unlearned.hf, pair.base.hf, chosen))


@torch.no_grad()
def logits(hf: Any) -> Tensor:
    found: Tensor = hf(torch.arange(1, 13).view(2, 6)).logits
    return found


@pytest.mark.parametrize("family", DENSE)
def test_every_parameter_of_a_block_belongs_to_one_site(family: str) -> None:
    base = build_pair(family).base
    names, block = weights_of(base), f"{base.anatomy.blocks}.1."
    sorted_out = [name for site in IN_BLOCK for name in names.at([site], 1)]
    assert sorted(sorted_out) == sorted(name for name in names.all_names if name.startswith(block))
    assert all(
        names.at([site], 1) for site in IN_BLOCK if (family, site) != ("olmo", "norms")
    )  # OLMo's have no weights
    outside = [*names.before, *names.final_norm, *names.head]
    assert sorted(outside) == sorted(name for name in names.all_names if not name.startswith(f"{base.anatomy.blocks}."))
    assert names.head and names.before


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
def test_queries_keys_values_and_outputs_are_the_attention_s_projections(family: str) -> None:
    """Together all of them, and no row twice."""
    base = build_pair(family).base
    names = weights_of(base)
    whole = names.at(["attn_weights"], 0)
    assert set(names.at(["W_Q", "W_K", "W_V", "W_O"], 0)) == set(whole)
    rows: dict[str, list[int]] = {}
    for site in PIECES["attn"]:
        for name, some in names.at([site], 0).items():
            n_rows = base.hf.get_parameter(name).shape[-1 if family == "gpt2" else 0]
            rows.setdefault(name, []).extend(range(n_rows) if some is None else some.tolist())
    for name, found in rows.items():
        n_rows = base.hf.get_parameter(name).shape[-1 if family == "gpt2" else 0]
        assert sorted(found) == list(range(n_rows)), name


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("site", PIECES["attn"])
def test_a_slice_of_a_fused_projection_is_what_transformer_lens_splits_off(family: str, site: str) -> None:
    """The bridge computes with its own copies of the three parts: a wrong row would show in one of them."""
    pair = build_pair(family)
    mixed = restored(pair, weights_of(pair.base).at([site], 1))
    parts = {
        name: Model.wrap(hf, pair.tokenizer, name=name).bridge.blocks[1].attn
        for name, hf in (("mixed", mixed), ("base", pair.base.hf), ("unlearned", pair.unlearned.hf))
    }
    for piece, key in zip(PIECES["attn"], ("q", "k", "v"), strict=True):
        of = {name: getattr(attn, key).original_component.weight for name, attn in parts.items()}
        assert not torch.equal(of["base"], of["unlearned"])
        assert torch.equal(of["mixed"], of["base" if piece == site else "unlearned"]), piece


def test_gate_and_input_of_a_fused_mlp_are_its_halves() -> None:
    pair = build_pair("phi3")
    names = weights_of(pair.base)
    ours, theirs = (m.hf.get_parameter("model.layers.0.mlp.gate_up_proj.weight") for m in (pair.unlearned, pair.base))
    half = len(ours) // 2
    for site, from_base in (("W_gate", slice(0, half)), ("W_in", slice(half, None))):
        (value,) = restored_values(pair.unlearned.hf, pair.base.hf, names.at([site], 0)).values()
        expected = ours.clone()
        expected[from_base] = theirs[from_base]
        assert torch.equal(value, expected)
        assert not torch.equal(value, ours) and not torch.equal(value, theirs)


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
def test_restoring_everything_is_the_base(family: str) -> None:
    pair = build_pair(family)
    names = weights_of(pair.base)
    everything: dict[str, Tensor | None] = {}
    for place in ("before", *range(pair.n_layers), "after"):
        everything |= names.at([*IN_BLOCK, "router", "embed", "unembed"], place)  # type: ignore[arg-type]
    assert set(everything) == set(names.all_names)
    before = torch_state(pair.unlearned)
    assert not torch.equal(logits(pair.unlearned.hf), logits(pair.base.hf))
    assert torch.equal(logits(restored(pair, everything)), logits(pair.base.hf))
    assert torch_state(pair.unlearned) == before


def test_tied_embeddings_are_restored_at_one_end() -> None:
    pair = build_pair("gpt2")
    ours, theirs = pair.unlearned.hf, pair.base.hf
    assert ours.lm_head.weight is ours.transformer.wte.weight
    names = weights_of(pair.base)
    mixed = restored(pair, names.at(["embed"], "before"))
    assert mixed.transformer.wte.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()  # a pointer, no copy
    assert mixed.lm_head.weight is ours.lm_head.weight
    mixed = restored(pair, names.at(["unembed"], "after"))
    assert mixed.transformer.wte.weight is ours.transformer.wte.weight
    assert mixed.lm_head.weight.data_ptr() == theirs.lm_head.weight.data_ptr()


def test_an_expression_finds_names_where_they_are() -> None:
    names = weights_of(build_pair("llama").base)
    assert set(names.at([r"/mlp\.(up|gate)_proj/"], 2)) == set(names.at(["key_vectors"], 2))
    assert names.at([r"/layers\.1\..*q_proj/"], 0) == {}
    assert set(names.at([r"/layers\.1\..*q_proj/"], 1)) == {"model.layers.1.self_attn.q_proj.weight"}
    assert set(names.at(["/embed/"], "before")) == {"model.embed_tokens.weight"}
    assert set(names.at(["/^model.norm|lm_head/"], "after")) == {"model.norm.weight", "lm_head.weight"}


def test_rows_of_two_sites_are_joined() -> None:
    names = weights_of(build_pair("phi3").base)
    both = names.at(["W_Q", "W_K"], 0)["model.layers.0.self_attn.qkv_proj.weight"]
    assert both is not None and torch.equal(both, torch.arange(len(both)))
    assert names.at(["W_Q", "attn_weights"], 0)["model.layers.0.self_attn.qkv_proj.weight"] is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_is_no_gate_projection(family: str) -> None:
    names = weights_of(build_pair(family).base)
    assert any("gate" in name for name in names.all_names)
    assert not any(names.at([site], layer) for site in PIECES["mlp"] for layer in range(3))


def test_a_restored_tree_shares_every_module_without_a_changed_parameter() -> None:
    pair = build_pair("llama")
    mixed = restored(pair, weights_of(pair.base).at(["value_vectors"], 1))
    ours, theirs = dict(mixed.named_modules()), dict(pair.unlearned.hf.named_modules())
    assert list(ours) == list(theirs)
    path = ["", "model", "model.layers", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj"]
    assert [name for name in ours if ours[name] is not theirs[name]] == path
    assert mixed.config is pair.unlearned.hf.config
