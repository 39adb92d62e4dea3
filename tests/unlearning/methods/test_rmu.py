"""Where RMU steers and which weights it trains, on any architecture."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.unlearning.methods.helpers import DATA, START, build_model, losses_of
from unlearning import InputError
from unlearning.methods.rmu import RMU, RMUOptions, steered_layer, steering_vector, trained_parameters, with_layer

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
        forget, _ = losses_of(RMU, RMUOptions(), DATA, model=model)
    assert forget is not None
    assert forget.item() == pytest.approx(0, abs=1e-12)


def test_only_blocks_up_to_the_steered_one_have_a_gradient() -> None:
    model = build_model()
    forget, retain = losses_of(RMU, RMUOptions(), DATA, model=model)
    assert forget is not None and retain is not None
    (forget + retain).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "model.layers.0.mlp.down_proj.weight" in reached
    assert not any(name.startswith(("model.layers.1", "model.norm", "lm_head")) for name in reached)
