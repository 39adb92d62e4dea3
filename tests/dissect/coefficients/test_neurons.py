"""Neurons: those that were changed by hand are found in order, and every comparison set is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dissect.coefficients.hooks import down_projections, scored_coefficients
from dissect.coefficients.neurons import (
    NEAREST,
    NeuronChanges,
    matched_neurons,
    neuron_changes,
    neuron_sets,
    powers_of_two,
    top_tokens,
    value_vectors,
    vocabulary_scores,
)
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from tests.dissect.coefficients.test_changes import DENSE
from tests.dissect.helpers import (
    assert_close,
    build_model,
    build_pair,
    build_prompts,
    build_tokenizer,
    change_weights,
    decoder_blocks,
)

D_MLP = 48
SCALED = {17: 5.0, 3: 4.0, 40: 3.0, 8: 2.0, 31: 1.0}
"""By how much the last layer's neurons are to change, in units of the score."""


def hand_scaled_pair(folder: Path) -> ModelPair:
    """A Llama whose last layer's coefficients were scaled by rows of the up projection, by what `SCALED` asks for."""
    base = Model.wrap(build_model("llama"), build_tokenizer(), name="base")
    changes = neuron_changes(base, base, build_prompts(folder))
    unlearned = build_model("llama")
    with torch.no_grad():
        for neuron, score in SCALED.items():
            up = decoder_blocks(unlearned)[2].get_submodule("mlp.up_proj").get_parameter("weight")
            up[neuron] *= 1 + score / changes.scale[2, neuron].item()
    return ModelPair(base, Model.wrap(unlearned, build_tokenizer(), name="unlearned"))


def test_neurons_that_were_scaled_by_hand_are_found_in_order(tmp_path: Path) -> None:
    pair, prompts = hand_scaled_pair(tmp_path), build_prompts(tmp_path)
    changes = neuron_changes(pair.base, pair.unlearned, prompts)
    found = changes.ranking()[: len(SCALED)]
    assert [divmod(int(flat), D_MLP) for flat in found] == [(2, neuron) for neuron in SCALED]
    for neuron, score in SCALED.items():
        assert_close(changes.score[2, neuron].item(), score, atol=1e-4)
        factor = 1 + score / changes.scale[2, neuron].item()
        assert_close(changes.other[2, neuron].item(), changes.base[2, neuron].item() * factor, atol=1e-4)
    assert int((changes.change > 0).sum()) == len(SCALED)


def test_mean_coefficients_weigh_examples_alike(tmp_path: Path) -> None:
    pair, prompts = build_pair("neox"), build_prompts(tmp_path)
    changes = neuron_changes(pair.base, pair.unlearned, prompts, batch_size=2)
    (batch,) = prompts.batches(len(prompts), padding_side="left")
    ours, theirs = (scored_coefficients(model, batch).double() for model in (pair.base, pair.unlearned))
    rows = batch.rows.numpy()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[:, rows == example].mean(1) for example in range(len(prompts))]).mean(0)

    assert_close(changes.base, mean(ours), atol=1e-5)
    assert_close(changes.other, mean(theirs), atol=1e-5)
    assert_close(changes.base_size, mean(ours.abs()), atol=1e-5)
    assert_close(changes.change, mean((ours - theirs).abs()), atol=1e-5)


@pytest.mark.parametrize("family", DENSE)
def test_value_vector_is_what_one_unit_of_a_coefficient_writes(family: str) -> None:
    model = Model.wrap(build_model(family), build_tokenizer(), name=family)
    vectors = value_vectors(model, 1)
    unit = torch.eye(len(vectors))
    down = down_projections(model)[1]
    assert_close(vectors, (down(unit) - down(torch.zeros_like(unit))).detach(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "olmo"])
def test_vocabulary_scores_go_through_the_norms_weight_and_the_unembedding(family: str) -> None:
    hf = build_model(family)
    if family != "olmo":  # whose norms have no weights
        change_weights(hf, lambda name: "norm" in name or "ln_f" in name, scale=0.3)
    model = Model.wrap(hf, build_tokenizer(), name=family)
    state = {name.rpartition("model.")[2].rpartition("transformer.")[2]: one for name, one in hf.state_dict().items()}
    gain = {
        "llama": lambda: state["norm.weight"],
        "gpt2": lambda: state["ln_f.weight"],
        "neox": lambda: hf.state_dict()["gpt_neox.final_layer_norm.weight"],
        "gemma2": lambda: 1 + state["norm.weight"],
        "olmo": lambda: torch.ones(32),
    }[family]()
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    centred = vectors - vectors.mean(-1, keepdim=True) if family in ("gpt2", "neox", "olmo") else vectors
    unit = centred / centred.square().mean(-1, keepdim=True).sqrt()
    expected = (unit * gain) @ hf.get_output_embeddings().weight.T
    assert_close(vocabulary_scores(model, vectors).detach(), expected.detach(), atol=1e-3)


def test_top_tokens_are_those_that_the_value_vector_points_at() -> None:
    hf = build_model("llama", tied=False)
    model = Model.wrap(hf, build_tokenizer(), name="llama")
    rows = hf.get_submodule("lm_head").get_parameter("weight")
    with torch.no_grad():
        down = decoder_blocks(hf)[0].get_submodule("mlp.down_proj").get_parameter("weight")
        down[:, 5] = 0
        down[0, 5] = 1
        rows[:, 0] = torch.arange(len(rows)) / 100
    promoted, demoted = top_tokens(model, 0, 5, count=3)
    last = len(rows) - 1
    assert promoted == [model.tokenizer.decode([token]) for token in (last, last - 1, last - 2)]
    assert demoted == [model.tokenizer.decode([token]) for token in (0, 1, 2)]


def test_powers_of_two_end_with_all() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(5) == [1, 2, 4, 5]
    assert powers_of_two(8) == [1, 2, 4, 8]


def random_changes(seed: int = 0, layers: int = 3, width: int = 40) -> NeuronChanges:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(layers, width, generator=generator, dtype=torch.float64) for _ in range(5)]
    return NeuronChanges(*drawn)


def test_sets_are_the_top_k_and_as_many_others() -> None:
    changes = random_changes()
    sets = neuron_sets(changes, draws=2, seed=3)
    flat = changes.score.flatten()
    for one in sets:
        assert int(one.chosen.sum()) == one.k
        assert one.layers == [layer for layer in range(3) if one.chosen[layer].any()]
        top = torch.zeros_like(flat, dtype=torch.bool)
        top[flat.topk(one.k).indices] = True
        if one.selection == "top":
            assert torch.equal(one.chosen.flatten(), top)
        if one.selection == "matched":
            assert not (one.chosen.flatten() & top).any()
            assert torch.equal(one.chosen.sum(1), top.view(3, 40).sum(1))
    by_selection = {(one.selection, one.k, one.draw): one.chosen for one in sets}
    assert [one.k for one in sets if one.selection == "top"] == [1, 2, 4, 8, 16, 32, 64, 120]
    for k in (1, 2, 4, 8, 16, 32):
        assert not (by_selection["random", k, 0] & ~by_selection["random", 2 * k, 0]).any()
    assert not torch.equal(by_selection["random", 32, 0], by_selection["random", 32, 1])
    assert not torch.equal(by_selection["matched", 8, 0], by_selection["matched", 8, 1])
    assert ("matched", 32, 0) in by_selection
    assert ("matched", 64, 0) not in by_selection


def test_sets_are_those_of_their_seed() -> None:
    ours, again, other = (neuron_sets(random_changes(), draws=1, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(ours, again, strict=True))
    assert any(not torch.equal(a.chosen, b.chosen) for a, b in zip(ours, other, strict=True))


def test_matched_neurons_are_near_in_scale() -> None:
    scale = np.arange(100, dtype=np.float64).reshape(1, 100)
    chosen = np.array([10, 50, 90])
    for seed in range(20):
        found = matched_neurons(chosen, scale, np.random.default_rng(seed))
        assert found is not None
        assert len(set(found)) == 3
        assert not set(found) & set(chosen)
        assert np.abs(np.sort(found) - chosen).max() <= NEAREST // 2 + 1


def test_matched_neurons_need_enough_others() -> None:
    scale = np.ones((2, 4))
    generator = np.random.default_rng(0)
    found = matched_neurons(np.array([0, 1]), scale, generator)
    assert found is not None
    assert set(found) == {2, 3}
    assert matched_neurons(np.array([4, 5, 6]), scale, generator) is None
