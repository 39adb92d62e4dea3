"""Putting coefficients back: equal to the reference engine's patch, nothing where nothing is done, no accidents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from dissect.coefficients.edits import FACTORS, restore_neurons, scale_layers
from dissect.coefficients.neurons import NeuronSet, neuron_changes, neuron_sets
from dissect.engine.reference import record, scored_logits
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.sites import SITES
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import knowledge_recovery_score, logit_mse, per_example
from dissect.scoring.rows import NO_DIFFERENCE
from tests.dissect.coefficients.test_neurons import SCALED, hand_scaled_pair
from tests.dissect.helpers import assert_close, build_model, build_pair, build_prompts, build_tokenizer

SCORES = ["krs", "logprob_recovery", "kl_recovery", "loss_intervened", "logprob_intervened", "kl_intervened", "kl_own"]


def reference_krs(pair: ModelPair, batch: Batch, layers: Sequence[int], factor: float = 1) -> Tensor:
    """KRS of the `mlp_coef` patch, by TransformerLens' hooks."""
    points = [SITES["mlp_coef"].hook_name(layer) for layer in layers]
    base, given = record(pair.base, batch, points)
    before, own = record(pair.unlearned, batch, points)

    def replaced(_activation: Tensor, hook: Any) -> Tensor:
        return own[hook.name] + factor * (given[hook.name] - own[hook.name])

    after = scored_logits(pair.unlearned, batch, [(point, replaced) for point in points])
    losses = [per_example(logit_mse(base, one), batch.rows, len(batch.examples)) for one in (after, before)]
    return knowledge_recovery_score(losses[0], losses[1])


def one_batch(prompts: Prompts, side: Any = "right") -> Batch:
    (batch,) = prompts.batches(len(prompts), padding_side=side)
    return batch


def neurons_of(pair: ModelPair, prompts: Prompts, sets: Sequence[NeuronSet], batches: list[Batch]) -> pd.DataFrame:
    targets = {"unlearned": pair.unlearned}
    found = [restore_neurons(pair.base, targets, prompts, batch, sets, lambda _n: None) for batch in batches]
    return pd.DataFrame([row for rows in found for row in rows])


def scaling_of(
    pair: ModelPair, prompts: Prompts, layers: Sequence[int], batches: list[Batch], factors: Sequence[float] = FACTORS
) -> pd.DataFrame:
    targets = {"unlearned": pair.unlearned}
    found = [scale_layers(pair.base, targets, prompts, batch, layers, factors, lambda _n: None) for batch in batches]
    return pd.DataFrame([row for rows in found for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "opt", "gemma2"])
def test_all_neurons_of_all_layers_are_the_patch_of_the_coefficients(family: str, side: str, tmp_path: Path) -> None:
    pair, prompts = build_pair(family), build_prompts(tmp_path)
    batch = one_batch(prompts, side)
    everything = torch.ones(neuron_changes(pair.base, pair.base, prompts).change.shape, dtype=torch.bool)
    frame = neurons_of(pair, prompts, [NeuronSet("top", everything.numel(), 0, everything)], [batch])
    assert_close(frame["krs"].to_numpy(), reference_krs(pair, batch, range(3)), atol=1e-5)
    assert (frame["krs"] < 1 - 1e-3).all()  # attention and weights differ too


def test_restoring_the_hand_scaled_neurons_brings_everything_back_and_each_more_some(tmp_path: Path) -> None:
    pair, prompts = hand_scaled_pair(tmp_path), build_prompts(tmp_path)
    changes = neuron_changes(pair.base, pair.unlearned, prompts)
    frame = neurons_of(pair, prompts, neuron_sets(changes, draws=2, seed=0), prompts.batches(16))
    top = frame[frame["selection"] == "top"].groupby("k")["krs"].mean()
    assert_close(top.loc[8:].to_numpy(), np.ones(len(top.loc[8:])), atol=1e-6)
    assert top[4] < 0.999
    matched = frame[frame["selection"] == "matched"].groupby("k")["krs"].mean()
    assert_close(matched.loc[8:].to_numpy(), np.zeros(len(matched.loc[8:])), atol=1e-6)  # none of them was changed
    random = frame[(frame["selection"] == "random") & (frame["k"] <= len(SCALED))].groupby("k")["krs"].mean()
    assert (random < top.loc[random.index]).all()


def test_neurons_restored_are_those_that_are_named(tmp_path: Path) -> None:
    pair, prompts = build_pair("llama"), build_prompts(tmp_path)
    batch = one_batch(prompts)
    chosen = torch.zeros(3, 48, dtype=torch.bool)
    chosen[0, 3] = chosen[2, 7] = chosen[2, 8] = True
    points = [SITES["mlp_coef"].hook_name(layer) for layer in (0, 2)]
    base, given = record(pair.base, batch, points)

    def put_back(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        for neuron in [3] if hook.name == points[0] else [7, 8]:
            activation[..., neuron] = given[hook.name][..., neuron]
        return activation

    after = scored_logits(pair.unlearned, batch, [(point, put_back) for point in points])
    expected = per_example(logit_mse(base, after), batch.rows, len(batch.examples))
    frame = neurons_of(pair, prompts, [NeuronSet("top", 3, 0, chosen)], [batch])
    assert_close(frame["loss_intervened"].to_numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_scaling_starts_at_nothing_and_passes_through_the_patch(family: str, tmp_path: Path) -> None:
    pair, prompts = build_pair(family), build_prompts(tmp_path)
    batch = one_batch(prompts)
    frame = scaling_of(pair, prompts, [1, 2], [batch])
    still = frame[frame["factor"] == 0]
    assert (still[["krs", "kl_own", "logprob_recovery", "kl_recovery"]].fillna(0).to_numpy() == 0).all()
    for factor in (0.5, 1.0, 2.0):
        found = frame[frame["factor"] == factor]["krs"].to_numpy()
        assert_close(found, reference_krs(pair, batch, [1, 2], factor), atol=1e-5)
    assert (frame[frame["factor"] == 1]["kl_own"] > 1e-4).all()


def test_scaling_by_one_of_the_whole_change_is_the_base_again(tmp_path: Path) -> None:
    pair = build_pair("llama", chosen=lambda name: "mlp.up_proj" in name or "mlp.gate_proj" in name)
    prompts = build_prompts(tmp_path)
    frame = scaling_of(pair, prompts, [0, 1, 2], prompts.batches(16))
    whole = frame[frame["factor"] == 1]
    assert_close(whole["krs"].to_numpy(), np.ones(len(prompts)), atol=1e-6)
    assert_close(whole["logprob_intervened"].to_numpy(), whole["logprob_base"].to_numpy(), atol=1e-5)
    assert_close(whole["kl_intervened"].to_numpy(), np.zeros(len(prompts)), atol=1e-6)
    assert (whole["kl_own"] > 1e-4).all()


def test_identical_models_have_nothing_to_recover_and_say_so(tmp_path: Path) -> None:
    prompts = build_prompts(tmp_path)
    base = Model.wrap(build_model("llama"), build_tokenizer(), name="base")
    pair = ModelPair(base, base)
    everything = torch.ones(3, 48, dtype=torch.bool)
    batches = prompts.batches(16)
    for frame in (
        neurons_of(pair, prompts, [NeuronSet("top", 144, 0, everything)], batches),
        scaling_of(pair, prompts, [2], batches),
    ):
        assert frame[["krs", "kl_recovery"]].isna().to_numpy().all()
        assert (frame["undefined"] == NO_DIFFERENCE).all()
        assert (frame["kl_own"].abs() < 1e-12).all()


@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (2, "left"), (5, "left")])
def test_scores_do_not_depend_on_batches_padding_nor_order(batch_size: int, side: Any, tmp_path: Path) -> None:
    pair, prompts = build_pair("llama"), build_prompts(tmp_path)
    sets = neuron_sets(neuron_changes(pair.base, pair.unlearned, prompts), draws=1, seed=0)
    turned = Prompts(prompts.items[::-1], prompts.scoring, prompts.pad_token_id, prompts.source)

    def sorted_frame(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
        return frame.sort_values([*keys, "example"], ignore_index=True)

    for asked in (prompts, turned):
        cut = asked.batches(batch_size, padding_side=side)
        pairs = [
            (neurons_of(pair, prompts, sets, prompts.batches(16)), neurons_of(pair, asked, sets, cut)),
            (scaling_of(pair, prompts, [2], prompts.batches(16)), scaling_of(pair, asked, [2], cut)),
        ]
        for (whole, ours), keys in zip(pairs, (["selection", "k", "draw"], ["factor"]), strict=True):
            whole, ours = (sorted_frame(frame, keys) for frame in (whole, ours))
            assert list(ours["example"]) == list(whole["example"])
            assert_close(ours[SCORES].to_numpy(), whole[SCORES].to_numpy(), atol=2e-4)
