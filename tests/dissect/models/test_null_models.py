"""Null models: as far from the base as the unlearned one, in another direction; and what any diffuse change shows."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dissect import patch, restore
from dissect.models.model import Model
from dissect.models.null_models import null_model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompt, Prompts
from tests.dissect.helpers import build_pair, build_prompts, build_tokenizer, torch_state
from unlearning.common.errors import InputError


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.hf.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_every_tensor_is_moved_as_far_as_unlearning_moved_it(family: str, tied: bool) -> None:
    pair = build_pair(family, chosen=lambda name: ".1." in name or "embed" in name or "wte" in name, tied=tied)
    before = {name: tensor.clone() for name, tensor in weights_of(pair.base).items()}
    state = torch_state(pair.base)
    nulls = [null_model(pair.base, pair.unlearned, seed=seed) for seed in (0, 0, 1)]
    base, unlearned = weights_of(pair.base), weights_of(pair.unlearned)
    moved, first, again, other = set(), *(weights_of(null) for null in nulls)
    assert base.keys() == first.keys()
    for name, tensor in base.items():
        real, step = (unlearned[name] - tensor).double().flatten(), (first[name] - tensor).double().flatten()
        assert torch.equal(first[name], again[name])
        if not real.any():
            assert first[name].data_ptr() == tensor.data_ptr()
            continue
        moved.add(name)
        assert float(step.norm()) == pytest.approx(float(real.norm()), rel=1e-5)
        assert not torch.equal(first[name], other[name])
        # Of two random directions in n dimensions the cosine is about 1 / sqrt(n).
        for direction in (real, (other[name] - tensor).double().flatten()):
            assert abs(float(torch.cosine_similarity(step, direction, dim=0))) < 5 / math.sqrt(len(step))
    assert moved and len(moved) < len(base)
    embeddings, head = nulls[0].hf.get_input_embeddings().weight, nulls[0].hf.get_output_embeddings().weight
    assert torch.equal(embeddings, head) == tied
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(pair.base).items())
    assert torch_state(pair.base) == state
    assert len({pair.base.sha256, nulls[0].sha256, nulls[2].sha256}) == 3


def test_identical_and_streamed_models_have_no_null() -> None:
    same = build_pair("llama", scale=0.0)
    with pytest.raises(InputError, match="`null`.*base and unlearned have the same weights") as one:
        null_model(same.base, same.unlearned, seed=0)
    pair = build_pair("llama")
    streamed = replace(pair.base, streamed=object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`null`.*`stream`") as two:
        null_model(streamed, pair.unlearned, seed=0)
    assert "\n" not in str(one.value) + str(two.value)


def test_null_arms_stand_in_the_table_and_their_mean_in_the_curve(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each arm is the sweep into a null model; the curve has their mean over seeds, example by example."""
    pair, prompts = build_pair("gpt2"), build_prompts(tmp_path_factory.mktemp("null"))
    options = {"sites": "mlp_coef", "window": 1, "control": None, "progress": False}
    result = patch(pair, prompts, null=2, **options)  # type: ignore[arg-type]
    assert result.arms == ["main", "null-0", "null-1"]
    krs = result.frame.pivot(index=["centre", "example"], columns="arm", values="krs")
    for seed in (0, 1):
        null = null_model(pair.base, pair.unlearned, seed=seed)
        alone = patch(ModelPair(pair.base, null), prompts, **options)  # type: ignore[arg-type]
        expected = alone.frame.set_index(["centre", "example"])["krs"]
        pd.testing.assert_series_equal(krs[f"null-{seed}"], expected.sort_index(), check_names=False, atol=1e-5)
    mean = krs[["null-0", "null-1"]].mean(axis=1)
    curve = result.curve().set_index(["arm", "centre"])["krs"]
    contrast = result.contrast().set_index(["arm", "centre"])["difference"]
    for centre in range(3):
        assert curve["null", centre] == pytest.approx(mean[centre].mean(), abs=1e-9)
        assert contrast["null", centre] == pytest.approx((krs["main"] - mean)[centre].mean(), abs=1e-9)


def build_noisy_pair(seed: int) -> ModelPair:
    """The structural null of dissecting.md, section 4: every block matrix of a random Llama with 20 % noise."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(seed)
    base, moved = (LlamaForCausalLM(config).double().eval() for _ in range(2))
    with torch.no_grad():
        for (name, ours), theirs in zip(base.named_parameters(), moved.parameters(), strict=True):
            if ours.dim() > 1:
                ours.copy_(torch.randn(ours.shape, generator=generator, dtype=torch.float64) * 0.15)
            noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64) * ours.std() * 0.2
            theirs.copy_(ours + noise if ours.dim() > 1 and ".layers." in name else ours)
    wrapped = (Model.wrap(hf, build_tokenizer(), name=name) for hf, name in ((base, "base"), (moved, "moved")))
    return ModelPair(*wrapped)


def random_prompts(seed: int) -> Prompts:
    """Four rows of twelve tokens, scored at the five positions that predict the last five."""
    ids = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    items = [Prompt(str(row), str(row), "", "", tuple(some), 7, range(6, 11)) for row, some in enumerate(ids)]
    return Prompts(tuple(items), "answer", 0, "nowhere")


def test_noise_alone_gives_coefficients_a_recovery_that_value_vectors_do_not_have() -> None:
    """What dissecting.md gives for eight seeds; its heads, prompts and embeddings are not known, so within a margin."""
    rows = []
    for seed in range(3):
        pair, prompts = build_noisy_pair(seed), random_prompts(seed)
        options = {"window": [5, "layers 0-7"], "control": None, "progress": False}
        frames = [
            patch(pair, prompts, sites="mlp_coef,attn_out,mlp_coef+attn_out", **options).frame,  # type: ignore[arg-type]
            restore(pair, prompts, sites="value_vectors", **options).frame,  # type: ignore[arg-type]
        ]
        rows.append(pd.concat(frames).groupby(["window", "site"])["krs"].mean())
    means = pd.concat(rows, axis=1).mean(axis=1)
    expected = {
        ("5", "mlp_coef"): (0.48, 0.12),
        ("5", "attn_out"): (0.57, 0.15),
        ("5", "mlp_coef+attn_out"): (0.76, 0.1),
        ("5", "value_vectors"): (0.03, 0.07),
        ("layers 0-7", "mlp_coef"): (0.73, 0.12),
        ("layers 0-7", "attn_out"): (0.84, 0.12),
        ("layers 0-7", "mlp_coef+attn_out"): (0.975, 0.04),
        ("layers 0-7", "value_vectors"): (0.05, 0.12),
    }
    assert set(means.index) == set(expected)
    for place, (published, within) in expected.items():
        assert means[place] == pytest.approx(published, abs=within), (place, means.to_dict())
