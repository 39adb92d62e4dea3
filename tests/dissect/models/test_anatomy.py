"""Where the parts of a block are: TransformerLens' adapters resolved on real module trees."""

import pytest
from transformers import PretrainedConfig, PreTrainedModel

from dissect.models.anatomy import Anatomy, architecture_of, block_of, find_adapter, find_anatomy
from tests.dissect.helpers import build_model
from unlearning.common.errors import InputError

EXPECTED = {
    "llama": Anatomy("model.layers", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    "gpt2": Anatomy("transformer.h", "attn", None, "attn.c_proj", "mlp", "mlp.c_proj"),  # one matrix for q, k and v
    "neox": Anatomy("gpt_neox.layers", "attention", None, "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "phi3": Anatomy("model.layers", "self_attn", None, "self_attn.o_proj", "mlp", "mlp.down_proj"),
    "opt": Anatomy("model.decoder.layers", "self_attn", "self_attn.q_proj", "self_attn.out_proj", None, "fc2"),
    "mixtral": Anatomy("model.layers", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", None),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_paths_are_those_of_the_module_tree(family: str) -> None:
    hf = build_model(family)
    anatomy = find_anatomy(hf, find_adapter(hf, name=family))
    assert anatomy == EXPECTED[family]


def test_the_modules_of_a_block_are_those_of_its_layer() -> None:
    hf = build_model("llama")
    for layer in range(3):
        block, whole = block_of(hf, EXPECTED["llama"], layer), hf.model.layers[layer]
        assert block.whole is whole
        assert (block.attn, block.q_proj, block.o_proj) == (
            whole.self_attn,
            whole.self_attn.q_proj,
            whole.self_attn.o_proj,
        )
        assert (block.mlp, block.down_proj) == (whole.mlp, whole.mlp.down_proj)
    block = block_of(build_model("opt"), EXPECTED["opt"], 1)
    assert block.mlp is None and block.down_proj is not None


def test_the_architecture_of_a_model_that_was_never_saved_is_its_class() -> None:
    hf = build_model("llama")
    assert hf.config.architectures is None
    assert architecture_of(hf) == "LlamaForCausalLM"
    hf.config.architectures = ["GPT2LMHeadModel"]  # a configuration that names another family
    assert architecture_of(hf) == "LlamaForCausalLM"
    assert find_anatomy(hf, find_adapter(hf, name="llama")) == EXPECTED["llama"]


class NobodysForCausalLM(PreTrainedModel):
    config_class = PretrainedConfig


def test_an_architecture_that_transformer_lens_does_not_know_is_refused_by_name() -> None:
    hf = NobodysForCausalLM(PretrainedConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(InputError, match="mine: TransformerLens .* NobodysForCausalLM: ") as refused:
        find_adapter(hf, name="mine")
    assert "\n" not in str(refused.value)
