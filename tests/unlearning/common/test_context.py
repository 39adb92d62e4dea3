"""How long a text a model reads: what its configuration says, and what its rotary table is stretched to."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unlearning.helpers import build_tiny_llama
from unlearning.common.context import context_of, why_no_longer


def scaled(**rope: Any) -> Any:
    """A tiny Llama of 40 positions, and what scales them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=40,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def gap_in_a_batch(model: Any, short: int, long: int) -> float:
    """How far the logits of a short text move when a long one stands beside it."""
    ids = torch.randint(1, 64, (2, long), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    alone = model(ids[1:, :short]).logits[0]
    return float((model(ids, attention_mask=mask).logits[1, :short] - alone).abs().max())


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 40),
        ({"rope_type": "linear", "factor": 4.0}, 160),
        ({"rope_type": "yarn", "factor": 4.0}, 160),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 40),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 10}, 80),
        ({"rope_type": "dynamic", "factor": 4.0}, 40),
    ],
)
def test_a_fixed_scaling_stretches_the_context(rope: dict[str, Any], context: int) -> None:
    """And no further than texts have the same numbers alone and beside longer ones."""
    model = scaled(**rope)
    assert context_of(model) == context
    assert gap_in_a_batch(model, 20, context) < 1e-4
    assert bool(why_no_longer(model)) == (rope["rope_type"] == "dynamic")


def test_beyond_its_context_a_dynamic_scaling_gives_other_numbers_beside_longer_texts() -> None:
    model = scaled(rope_type="dynamic", factor=4.0)
    assert gap_in_a_batch(model, 20, 57) > 1e-2
    assert "beyond 40, its dynamic rotary scaling" in why_no_longer(model)


def test_other_models_have_the_context_of_their_configuration() -> None:
    model = build_tiny_llama()
    assert context_of(model) == model.config.max_position_embeddings
    assert why_no_longer(model) == ""
