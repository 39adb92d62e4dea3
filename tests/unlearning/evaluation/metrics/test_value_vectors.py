"""Value vectors: found in every architecture, and noise on them that leaves no trace."""

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.value_vectors import down_projections, noised, value_vector


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: build_tiny_llama(), "mlp.down_proj"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
            "mlp.c_proj",
        ),
        (
            lambda: GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
                )
            ),
            "mlp.dense_4h_to_h",
        ),
    ],
)
def test_down_projections_are_found_by_their_shape(build: Any, path: str) -> None:
    model = build()
    found = down_projections(model)
    assert len(found) == 2
    names = {id(module): name for name, module in model.named_modules()}
    assert all(names[id(module)].endswith(f"{layer}.{path}") for layer, module in enumerate(found))
    # Writing to a value vector changes what one unit of the coefficient adds.
    module = found[0]
    width = module.weight.numel() // 16 if path != "mlp.down_proj" else 64
    unit = torch.zeros(1, width)
    unit[0, 5] = 1
    with torch.no_grad():
        before = module(unit)
        value_vector(module, 5).add_(1)
        assert torch.allclose(module(unit), before + 1)


def test_down_projections_of_an_mlp_as_wide_as_the_stream_are_found_by_name() -> None:
    model = build_tiny_llama()
    config = model.config
    config.intermediate_size = 32
    square = type(model)(config)
    assert down_projections(square) == [layer.mlp.down_proj for layer in square.model.layers]


def test_a_mixture_of_experts_is_refused() -> None:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(InputError, match="`vectors=False`"):
        down_projections(MixtralForCausalLM(config))


def test_noise_is_gone_bit_for_bit_even_after_an_error() -> None:
    model = build_tiny_llama()
    before = content_hash(model, name="vanilla")
    vector = value_vector(down_projections(model)[1], 5)
    clean = vector.clone()

    def fail() -> None:
        with noised(vector, scale=0.1, seed=[0, 1]):
            noise = vector - clean
            raise KeyError(float(noise.std()))

    with pytest.raises(KeyError) as error:
        fail()
    assert 0.05 < error.value.args[0] < 0.2
    assert torch.equal(vector, clean)
    assert content_hash(model, name="vanilla") == before


def test_noise_is_that_of_its_scale() -> None:
    vector = torch.zeros(20_000)
    with noised(vector, scale=0.1, seed=[3]):
        first = vector.clone()
        assert float(first.std()) == pytest.approx(0.1, rel=0.03) and abs(float(first.mean())) < 0.005
    with noised(vector, scale=0.1, seed=[3]):
        assert torch.equal(vector, first)
    with noised(vector, scale=0.1, seed=[4]):
        assert not torch.equal(vector, first)
