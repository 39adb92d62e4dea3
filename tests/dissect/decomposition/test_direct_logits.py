"""Direct contributions: what all of a model's parts contribute to a logit adds up to that logit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dissect.decomposition.direct_logits import find_path, freeze
from dissect.decomposition.run import decompose
from dissect.decomposition.terms import SITES, hooked, record, scored
from dissect.models.model import Model
from dissect.scoring.forward import scored_logits
from tests.dissect.helpers import (
    assert_close,
    build_batch,
    build_pair,
    build_prompts,
    change_weights,
    decoder_blocks,
    torch_state,
)
from unlearning.common.errors import InputError

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2", "olmo", "opt", "bloom", "falcon", "qwen3", "gptj"]


def model_with_norms(family: str) -> Model:
    """A model whose norms have gains and biases of their own; at first they are ones and zeros."""
    model = build_pair(family).unlearned
    if family != "olmo":  # its norms have no weights
        change_weights(model.hf, lambda name: "norm" in name or "ln_" in name, scale=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_of_embedding_attention_and_mlp_add_up_to_the_logit(family: str, tmp_path: Path) -> None:
    model, batch = model_with_norms(family), build_batch(tmp_path, "right")
    path = find_path(model, batch, SITES)
    assert path.problem == ""
    own = record(model, batch, SITES, everywhere=False)
    entered: list[Tensor] = []
    first = decoder_blocks(model.hf)[0] if family not in ("bloom", "falcon", "gptj") else model.hf.transformer.h[0]
    with hooked([(first, "pre", lambda _module, args: entered.append(scored(args[0], batch)))]):
        scored_logits(model, batch)
    total = sum(
        path.contributions(
            own.outputs[site, layer][None],
            site=site,
            layer=layer,
            output=own.outputs[site, layer],
            final_state=own.final_state,
            tokens=batch.next_tokens,
        )[0, 0]
        for site in SITES
        for layer in range(model.n_layers)
    )
    norm, head = path.final_norm, model.hf.get_output_embeddings()
    assert norm is not None and isinstance(total, Tensor)
    rows = head.weight[batch.next_tokens].double().detach()
    total = total + (freeze(norm, own.final_state)(entered[0]) * rows).sum(-1)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        total = total + rows @ bias.double().detach()
    # What the projections and norms add besides: the biases of norms after them, which no family here has.
    if getattr(head, "bias", None) is not None:
        total = total + head.bias[batch.next_tokens].detach()
    logits = own.logits.gather(-1, batch.next_tokens[:, None])[:, 0].double()
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    if cap:
        total = cap * torch.tanh(total / cap)
    assert_close(total, logits, atol=2e-4)


def test_norms_after_the_projections_are_found_where_a_family_has_them(tmp_path: Path) -> None:
    batch = build_batch(tmp_path, "left")
    for family, after in {
        "llama": {"mlp_out": None, "attn_out": None},
        "gemma2": {"mlp_out": "post_feedforward_layernorm", "attn_out": "post_attention_layernorm"},
        "olmo2": {"mlp_out": "post_feedforward_layernorm", "attn_out": "post_attention_layernorm"},
    }.items():
        model = build_pair(family).unlearned
        before = torch_state(model)
        assert find_path(model, batch, SITES).after == after
        assert torch_state(model) == before


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(32), nn.RMSNorm(32), nn.LayerNorm(32, elementwise_affine=False), nn.RMSNorm(32, eps=1e-3)]
)
def test_a_frozen_norm_gives_at_its_own_states_what_the_norm_gives(norm: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    states = torch.randn(7, 32, generator=generator) * 3 + 1
    bias = getattr(norm, "bias", None)
    frozen = freeze(norm, states)
    assert frozen.centres == isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        expected = norm(states) - (0 if bias is None else bias)
    assert_close(frozen(states), expected, atol=1e-5)
    assert_close(frozen(2 * states), 2 * expected, atol=2e-5)  # linear, as the norm itself is not


def test_what_is_no_norm_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="GELU is neither a layer norm nor an RMS norm"):
        freeze(nn.GELU(), torch.randn(3, 32))


def test_centring_takes_the_vocabularys_mean_off(tmp_path: Path) -> None:
    model, batch = model_with_norms("gpt2"), build_batch(tmp_path, "right")
    path = find_path(model, batch, SITES)
    own = record(model, batch, SITES, everywhere=False)
    vectors = own.outputs["mlp_out", 1][None]

    def contributions(tokens: Tensor) -> Tensor:
        return path.contributions(
            vectors, site="mlp_out", layer=1, output=vectors[0], final_state=own.final_state, tokens=tokens
        )[:, 0]

    vocabulary = own.logits.shape[-1]
    every = torch.stack([contributions(torch.full_like(batch.next_tokens, token)) for token in range(vocabulary)])
    assert_close(every[:, 0] - every[:, 0].mean(0), every[:, 1], atol=1e-9)
    assert every[:, 0].mean(0).abs().max() > 1e-3
    nothing = contributions(torch.full_like(batch.next_tokens, -1))
    assert nothing.isnan().all()  # no token follows


def test_an_architecture_without_a_direct_path_says_so_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that scale what they add, as Granite's do."""
    pair = build_pair("llama")
    for model in (pair.base, pair.unlearned):
        block = decoder_blocks(model.hf)[1]
        monkeypatch.setattr(block.mlp, "forward", _halved(block.mlp.forward))
    result = decompose(pair, build_prompts(tmp_path), control=None, progress=False)
    assert result.frame["direct"].isna().all()
    assert (result.frame["direct_undefined"].str.contains("attention and MLP")).all()
    assert not result.frame["krs"].isna().any() and not result.frame["share"].isna().any()
    assert "direct" in set(result.undefined()["number"])
    assert not (result.save(tmp_path / "run") / "figures" / "direct.html").exists()


def _halved(forward: object) -> object:
    return lambda *args, **kwargs: forward(*args, **kwargs) / 2  # type: ignore[operator]


def test_direct_contributions_of_the_three_terms_add_up(tmp_path: Path) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        frame = decompose(build_pair(family), build_prompts(tmp_path), control=None, progress=False).frame
        keys = ["site", "first_layer", "last_layer", "example_index"]
        for column in ("direct", "direct_centred"):
            wide = frame.pivot(index=keys, columns="term", values=column)
            summed = wide["weight"] + wide["coefficient"] + wide["interaction"]
            assert_close(summed.to_numpy(), wide["total"].to_numpy(), atol=1e-9)
            assert wide["total"].abs().min() > 1e-6


def test_at_the_last_layer_it_is_the_change_of_the_logit_but_for_the_final_scale(tmp_path: Path) -> None:
    """Adding all three to the last MLP of NeoX moves the final state by just them: read it with the scale frozen."""
    pair = build_pair("neox")
    prompts = build_prompts(tmp_path)
    (batch,) = prompts.batches(len(prompts))
    result = decompose(pair, prompts, sites="mlp_out", control=None, progress=False)
    last = pair.n_layers - 1
    base, own = (record(model, batch, ("mlp_out",), everywhere=False) for model in (pair.base, pair.unlearned))
    moved = own.final_state + base.outputs["mlp_out", last] - own.outputs["mlp_out", last]
    hf = pair.unlearned.hf
    norm = hf.gpt_neox.final_layer_norm
    with torch.no_grad():
        scale = (own.final_state.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        logits = [
            hf.get_output_embeddings()(norm.weight * (state - state.mean(-1, keepdim=True)) / scale + norm.bias)
            for state in (moved, own.final_state)
        ]
    change = (logits[0] - logits[1]).gather(-1, batch.next_tokens[:, None])[:, 0]
    rows = result.positions
    found = rows[(rows["first_layer"] == last) & (rows["last_layer"] == last) & (rows["term"] == "total")]
    assert found["token"].tolist() == batch.next_tokens.tolist()
    assert_close(found["direct"].to_numpy(), change, atol=1e-4)
