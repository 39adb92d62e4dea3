"""Coefficient changes: by hand, equal to TransformerLens' hooks, and no accident of how prompts are batched."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dissect.coefficients.changes import CHANGES, change_of, coefficient_changes, last_layers_share
from dissect.coefficients.hooks import edited_logits, scored_coefficients
from dissect.engine.reference import record, scored_logits
from dissect.models.model import Model
from dissect.models.sites import SITES
from dissect.prompts.prompts import Prompts
from tests.dissect.helpers import (
    assert_close,
    build_batch,
    build_model,
    build_pair,
    build_prompts,
    build_tokenizer,
    torch_state,
)
from unlearning.common.errors import InputError

DENSE = ["llama", "neox", "neox_sequential", "gpt2", "gemma2", "olmo", "olmo2", "phi3", "qwen3", "opt", "falcon"]


def test_change_is_what_is_worked_out_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, -4.0], [0.0, 2.0], [1.0, 0.0]])
    change = change_of(base, other)
    assert_close(change["cosine"], np.array([-7 / 25, 0, np.nan]), atol=1e-15)
    assert_close(change["relative_change"], np.array([8 / 5, 5**0.5, np.nan]), atol=1e-15)
    assert_close(change["norm_ratio"], np.array([1, 2, np.nan]), atol=1e-15)
    assert_close(change["sign_changed"], np.array([0.5, 1, 0.5]), atol=0)
    assert_close(change["squared_change"], np.array([64, 5, 1]), atol=1e-14)


def test_identical_coefficients_did_not_change() -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    change = change_of(values, values)
    for name, expected in zip(CHANGES, (1, 0, 1, 0, 0), strict=True):
        assert_close(change[name], np.full(5, expected), atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DENSE)
def test_coefficients_and_logits_are_those_of_the_reference_engine(family: str, side: str, tmp_path: Path) -> None:
    model = Model.wrap(build_model(family), build_tokenizer(), name=family)
    batch = build_batch(tmp_path, side)
    points = [SITES["mlp_coef"].hook_name(layer) for layer in range(model.n_layers)]
    logits, states = record(model, batch, points)
    before = torch_state(model)
    ours = scored_coefficients(model, batch)
    assert torch_state(model) == before
    for layer, point in enumerate(points):
        assert_close(ours[layer], states[point][batch.rows, batch.columns], atol=2e-5)
    assert_close(edited_logits(model, batch), logits, atol=2e-5)


def test_positions_that_the_model_counts_itself_are_left_to_it(tmp_path: Path) -> None:
    """As in the notebooks' protocol, where left padding shifts them."""
    model = Model.wrap(build_model("gpt2"), build_tokenizer(), name="gpt2")
    batch = build_batch(tmp_path, "left")
    counted = replace(batch, position_ids=None)
    assert_close(edited_logits(model, counted), scored_logits(model, counted, []), atol=2e-5)
    assert not torch.allclose(edited_logits(model, counted), edited_logits(model, batch), atol=1e-2)


def test_hooks_are_gone_after_a_failure(tmp_path: Path) -> None:
    model = Model.wrap(build_model("llama"), build_tokenizer(), name="llama")
    batch = build_batch(tmp_path, "right")
    plain, before = scored_logits(model, batch, []), torch_state(model)

    def fail(layer: int, _coefficients: torch.Tensor) -> None:
        if layer == 1:
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        edited_logits(model, batch, fail)
    assert torch_state(model) == before
    assert_close(edited_logits(model, batch), plain, atol=2e-5)


def test_edit_stands_in_the_layers_that_are_named_and_nowhere_else(tmp_path: Path) -> None:
    model = Model.wrap(build_model("opt"), build_tokenizer(), name="opt")
    batch = build_batch(tmp_path, "left")
    asked: list[int] = []

    def double(layer: int, coefficients: torch.Tensor) -> torch.Tensor:
        asked.append(layer)
        return coefficients * 2

    def doubled(activation: torch.Tensor, **_hook: Any) -> torch.Tensor:
        return activation * 2

    ours = edited_logits(model, batch, double, [0, 2])
    assert asked == [0, 2]
    hooks = [(SITES["mlp_coef"].hook_name(layer), doubled) for layer in (0, 2)]
    assert_close(ours, scored_logits(model, batch, hooks), atol=2e-5)
    assert not torch.allclose(ours, edited_logits(model, batch), atol=1e-2)


def _same(ours: pd.DataFrame, theirs: pd.DataFrame, atol: float = 1e-5) -> None:
    assert list(ours["example"]) == list(theirs["example"])
    assert list(ours["layer"]) == list(theirs["layer"])
    for name in CHANGES:
        scale = np.maximum(1, np.abs(theirs[name].to_numpy()))
        assert_close(ours[name].to_numpy() / scale, theirs[name].to_numpy() / scale, atol=atol)


def test_frame_has_a_row_per_example_and_layer(tmp_path: Path) -> None:
    pair, prompts = build_pair("llama"), build_prompts(tmp_path)
    frame = coefficient_changes(pair.base, pair.unlearned, prompts)
    assert list(frame.columns) == ["example_index", "example", "group", "layer", *CHANGES]
    assert len(frame) == len(prompts) * 3
    # The mean over an example's own answer positions, and no others.
    (batch,) = prompts.batches(len(prompts))
    ours, theirs = (scored_coefficients(model, batch) for model in (pair.base, pair.unlearned))
    here = batch.rows == 3
    for name, values in change_of(ours[1][here], theirs[1][here]).items():
        cell = frame[(frame["example_index"] == 3) & (frame["layer"] == 1)]
        assert_close(cell[name].item(), values.mean().item(), atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_changes_do_not_depend_on_batches_nor_on_order(batch_size: int, tmp_path: Path) -> None:
    pair, prompts = build_pair("neox"), build_prompts(tmp_path)
    whole = coefficient_changes(pair.base, pair.unlearned, prompts)
    _same(coefficient_changes(pair.base, pair.unlearned, prompts, batch_size=batch_size), whole)
    turned = Prompts(prompts.items[::-1], prompts.scoring, prompts.pad_token_id, prompts.source)
    frame = coefficient_changes(pair.base, pair.unlearned, turned, batch_size=batch_size)
    frame["example_index"] = len(prompts) - 1 - frame["example_index"]
    _same(frame.sort_values(["example_index", "layer"], ignore_index=True), whole)


def test_last_layers_share_is_worked_out_by_hand() -> None:
    changes = pd.DataFrame(
        {
            "example_index": [0, 0, 0, 1, 1, 1],
            "group": [""] * 6,
            "layer": [0, 1, 2] * 2,
            "squared_change": [1.0, 2, 5, 3, 2, 7],
        }
    )
    shares = last_layers_share(changes)
    assert list(shares["last_layers"]) == [1, 2, 3]
    assert list(shares["first_layer"]) == [2, 1, 0]
    assert_close(shares["share"].to_numpy(), np.array([12 / 20, 16 / 20, 1]), atol=1e-15)
    assert_close(shares["even"].to_numpy(), np.array([1 / 3, 2 / 3, 1]), atol=1e-15)
    # With two examples a draw is one of them twice, or both.
    assert_close(shares[["share_low", "share_high"]].to_numpy()[0], np.array([7 / 12, 5 / 8]), atol=1e-15)


def test_share_of_a_change_that_is_not_there_is_undefined(tmp_path: Path) -> None:
    pair = build_pair("llama")
    frame = coefficient_changes(pair.base, pair.base, build_prompts(tmp_path))
    assert (frame["relative_change"] == 0).all()
    assert last_layers_share(frame)["share"].isna().all()


def test_change_of_one_layer_is_found_there_alone(tmp_path: Path) -> None:
    pair = build_pair("llama", chosen=lambda name: name == "model.layers.2.mlp.up_proj.weight")
    frame = coefficient_changes(pair.base, pair.unlearned, build_prompts(tmp_path))
    assert (frame[frame["layer"] < 2]["squared_change"] == 0).all()
    assert (frame[frame["layer"] == 2]["squared_change"] > 0).all()
    assert last_layers_share(frame)["share"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixture_of_experts_is_refused_by_name(family: str, tmp_path: Path) -> None:
    model = Model.wrap(build_model(family), build_tokenizer(), name="experts")
    with pytest.raises(InputError, match=r"^experts has no MLP coefficients: .*mixtures of experts") as refused:
        coefficient_changes(model, model, build_prompts(tmp_path))
    assert "\n" not in str(refused.value)


def test_streamed_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    pair = build_pair("llama")
    opened: Any = object()
    streamed = replace(pair.unlearned, streamed=opened)
    with pytest.raises(InputError, match=r"^unlearned is streamed from disk, .*`stream`"):
        coefficient_changes(pair.base, streamed, build_prompts(tmp_path))


def test_batch_size_of_none_is_refused(tmp_path: Path) -> None:
    pair = build_pair("llama")
    with pytest.raises(InputError, match="batch_size.*0"):
        coefficient_changes(pair.base, pair.unlearned, build_prompts(tmp_path), batch_size=0)
