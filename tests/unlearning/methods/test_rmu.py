"""Where RMU steers and which weights it trains, on any architecture."""

import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.unlearning.helpers import build_examples
from tests.unlearning.methods.helpers import DATA, START, build_model, build_spans, losses_of, slow_hidden
from unlearning import InputError, train
from unlearning.data.spans import AnswerSpan
from unlearning.methods.blur import BLUR, BLUROptions
from unlearning.methods.rmu import (
    RMU,
    RMUOptions,
    output_norms,
    steered_layer,
    steering_vector,
    trained_parameters,
    with_coefficient,
    with_layer,
)
from unlearning.methods.stages import RunFacts

LLAMA = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
ARCHITECTURES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {**LLAMA, "intermediate_size": 24}, "model.layers.{}.mlp.down_proj.weight"),
    ("llama", {**LLAMA, "intermediate_size": 16}, "model.layers.{}.mlp.down_proj.weight"),  # as wide as the model
    ("gemma2", {**LLAMA, "intermediate_size": 24, "head_dim": 8}, "model.layers.{}.mlp.down_proj.weight"),
    (
        "gpt_neox",
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    ),
    ("gpt2", {"n_embd": 16, "n_layer": 4, "n_head": 2}, "transformer.h.{}.mlp.c_proj.weight"),
    (
        "opt",
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "word_embed_proj_dim": 8},
        "model.decoder.layers.{}.fc2.weight",
    ),
    (
        "falcon",
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        "transformer.h.{}.mlp.dense_4h_to_h.weight",
    ),
]


def build(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=32, **tokens, **config))


@pytest.mark.parametrize(("kind", "config", "name"), ARCHITECTURES)
def test_the_down_projections_are_found(kind: str, config: dict[str, Any], name: str) -> None:
    model = build(kind, config)
    for layer, expected in ((3, [1, 2, 3]), (2, [0, 1, 2]), (1, [0, 1]), (0, [0])):
        matches = re.compile(trained_parameters(model, RMUOptions(layer=layer))).search
        found = [parameter for parameter, _ in model.named_parameters() if matches(parameter)]
        assert found == [name.format(place) for place in expected]


def test_fused_experts_are_refused() -> None:
    model = build("mixtral", {**LLAMA, "intermediate_size": 24, "num_local_experts": 2})
    with pytest.raises(InputError, match="not found in layer 0 .*`train_parameters`"):
        trained_parameters(model, RMUOptions(layer=1))


@pytest.mark.parametrize(("n_layers", "layer"), [(1, 0), (4, 0), (6, 1), (8, 1), (22, 5), (24, 5), (32, 7)])
def test_the_default_layer_ends_a_quarter_of_the_depth(n_layers: int, layer: int) -> None:
    model = build("llama", {**LLAMA, "num_hidden_layers": n_layers, "intermediate_size": 24})
    assert steered_layer(model, None) == layer  # 7 of Zephyr-7B's 32
    assert with_layer(model, RMUOptions()).layer == layer


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="`layer` must be between 0 and 1 .* got 2"):
        steered_layer(START, 2)


def test_a_block_at_the_target_has_no_forget_loss() -> None:
    """The last map of block 0 and everything that adds to it are silenced; a constant embedding then is its output."""
    model = build_model()
    target = 6.5 * steering_vector(32, seed=0).double()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(target.expand(384, 32))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        forget, _ = losses_of(RMU, RMUOptions(steering_coefficient=6.5), DATA, model=model)
    assert forget is not None
    assert forget.item() == pytest.approx(0, abs=1e-12)


def test_only_blocks_up_to_the_steered_one_have_a_gradient() -> None:
    model = build_model()
    forget, retain = losses_of(RMU, RMUOptions(steering_coefficient=6.5), DATA, model=model)
    assert forget is not None and retain is not None
    (forget + retain).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "model.layers.0.mlp.down_proj.weight" in reached
    assert not any(name.startswith(("model.layers.1", "model.norm", "lm_head")) for name in reached)


SPANS = build_spans([(3, 1), (5, 4), (2, 7), (1, 1)], seed=6)


def slow_norms(model: LlamaForCausalLM, spans: Sequence[AnswerSpan], *, skip_first: bool) -> list[float]:
    """Norms of block 0's output, text by text and token by token."""
    rows = [slow_hidden(model, span, 0)[1 if skip_first else 0 :] for span in spans]
    return [math.sqrt(sum(value.item() ** 2 for value in row)) for text in rows for row in text]


def with_massive_token(factor: float) -> LlamaForCausalLM:
    """START, with the first token of the first text far from all others."""
    model = copy.deepcopy(START)
    with torch.no_grad():
        model.model.embed_tokens.weight[SPANS[0].input_ids[0]] *= factor
    return model


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("ratio", [None, 1.2, 4.0])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@torch.no_grad()
def test_the_mean_norm_is_that_of_a_loop(skip_first: bool, ratio: float | None, batch_size: int) -> None:
    model = with_massive_token(300)
    every, kept = slow_norms(model, SPANS, skip_first=False), slow_norms(model, SPANS, skip_first=skip_first)
    median = sorted(kept)[(len(kept) - 1) // 2]
    counted = [norm for norm in kept if ratio is None or norm <= ratio * median]
    norms = output_norms(model, SPANS, 0, batch_size=batch_size, massive_ratio=ratio, skip_first_token=skip_first)
    assert norms.mean == pytest.approx(sum(counted) / len(counted), rel=1e-10)
    assert (norms.tokens, norms.left_out) == (len(counted), len(every) - len(counted))
    assert norms.largest == pytest.approx(max(every), rel=1e-10)
    usual = output_norms(START, SPANS, 0, batch_size=4).mean
    if ratio is None and not skip_first:
        assert norms.mean > 1.8 * usual
    else:  # without the massive token
        assert norms.mean < 1.2 * usual


@given(scale=st.floats(0.01, 100))
@settings(max_examples=10)
def test_the_coefficient_follows_the_models_scale(scale: float) -> None:
    """A constant embedding is the silenced block's output: its norm is known."""
    model = build_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_((scale * steering_vector(32, seed=1).double()).expand(384, 32))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    facts = RunFacts(forget=SPANS, steps=1, batch_size=2)
    settled = with_coefficient(model, facts, RMUOptions(layer=0, steering_scale=3.0))
    assert settled.options.steering_coefficient == pytest.approx(3 * scale, rel=1e-6)
    constant = with_coefficient(model, facts, RMUOptions(layer=0, steering_coefficient=6.5))
    assert constant.options.steering_coefficient == 6.5
    for each in (settled, constant):
        note = each.notes["steering"]
        assert note["mean_norm"] == pytest.approx(scale, rel=1e-6)
        assert f"{note['coefficient']:.4g}" in each.said[0] and f"{note['mean_norm']:.4g}" in each.said[0]


def test_blur_steers_as_rmu_does() -> None:
    facts = RunFacts(forget=SPANS, steps=1, batch_size=2)
    own: dict[str, Any] = {"layer": 0, "steering_scale": 2.0, "massive_ratio": None, "skip_first_token": True}
    theirs = with_coefficient(START, facts, RMUOptions(**own))
    ours = BLUR.settle(START, facts, BLUROptions(forget_loss="rmu", retain_loss="hidden", **own))  # type: ignore[misc]
    assert ours.options.steering_coefficient == theirs.options.steering_coefficient
    assert (ours.notes, ours.said) == (theirs.notes, theirs.said)
    assert BLUR.settle(START, facts, BLUROptions()).options == BLUROptions()  # type: ignore[misc]


def test_texts_and_blocks_without_a_mean_norm_are_refused() -> None:
    with pytest.raises(InputError, match="`skip_first_token` leaves no token.*Set it to false"):
        output_norms(START, build_spans([(0, 1), (0, 1)], seed=1), 0, batch_size=2, skip_first_token=True)
    silent = copy.deepcopy(START)
    for parameter in silent.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(InputError, match="`layer` 0 has outputs of mean norm 0.*`steering_coefficient`"):
        output_norms(silent, SPANS, 0, batch_size=2)


@pytest.mark.parametrize("method", ["rmu", "blur"])
def test_the_coefficient_of_a_run_is_shown_and_kept(
    method: str, model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, examples = tmp_path / "run", build_examples()
    given_options = {"forget_loss": "rmu"} if method == "blur" else {}
    train(
        method, model=model_dir, forget=examples[:4], retain=examples[4:], output_dir=out, max_steps=1, device="cpu",
        **given_options,
    )  # fmt: skip
    record = json.loads((out / "unlearning.json").read_text())
    note = record["notes"]["steering"]
    assert record["resolved"]["steering_coefficient"] == note["coefficient"] == 5 * note["mean_norm"]
    shown = capfd.readouterr().err
    assert f"steering to norm {note['coefficient']:.4g}, 5 times the mean norm {note['mean_norm']:.4g}" in shown
