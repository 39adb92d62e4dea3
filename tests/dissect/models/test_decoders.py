"""Only decoders whose logits are finite are loaded, and configurations choose nothing that breaks a number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dissect.models.model import Model, load_model
from tests.dissect.families import build, randomised
from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
from unlearning.checkpoints.causality import check_causal
from unlearning.checkpoints.load import load_weights
from unlearning.common.errors import InputError

_BERT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_and_the_same_weights_as_a_decoder_are_not(kind: str) -> None:
    def built(is_decoder: bool) -> Any:
        config = AutoConfig.for_model(kind, **_BERT, is_decoder=is_decoder)
        return randomised(AutoModelForCausalLM.from_config(config))

    with pytest.raises(InputError, match="^mine .*not a decoder.*is_decoder to true"):
        check_causal(built(False), "mine")
    check_causal(built(True), "mine")


def test_small_random_weights_do_not_hide_an_encoder() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **_BERT)).eval()
    with pytest.raises(InputError, match="not a decoder"):
        check_causal(model, "mine")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-neox", "the first gpt", "gemma 3"])
def test_decoders_are_accepted_though_is_decoder_is_false(name: str) -> None:
    check_causal(build(name), name)


def test_logits_that_are_not_finite_are_called_so_when_a_model_is_loaded() -> None:
    model = build_tiny_llama()
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = -100.0
    with pytest.raises(InputError, match="^mine: its logits are not finite.*without any intervention"):
        Model.wrap(model, build_tokenizer(), name="mine")


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_mixtures_compute_in_float64(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    wide = load_model(tmp_path, device="cpu", dtype="float64").hf
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, wide(input_ids=ids).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt-2", "llama", "the first gpt"])
@pytest.mark.parametrize(
    "fields", [{"return_dict": False}, {"output_attentions": True, "output_hidden_states": True}, {"use_cache": False}]
)
def test_what_a_call_returns_is_no_part_of_a_model(name: str, fields: dict[str, bool], tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | fields))
    ids = torch.arange(3, 9)[None]
    output = load_weights(tmp_path)(input_ids=ids)
    assert torch.equal(output.logits, model(input_ids=ids).logits)
    assert output.get("attentions") is None and output.get("hidden_states") is None
    assert load_model(tmp_path, device="cpu").n_layers == 3


def test_a_residual_stream_of_several_copies_is_refused_in_one_line() -> None:
    config = AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=8,
        o_lora_rank=8,
        o_groups=2,
        qk_rope_head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    with pytest.raises(InputError, match=r"(?s)^mine[^\n]*not supported[^\n]*\[batch, position, width\]$"):
        Model.wrap(AutoModelForCausalLM.from_config(config).eval(), build_tokenizer(), name="mine")
