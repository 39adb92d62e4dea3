"""Training without dropout: what is computed, what keeps its mode, and that blocks are still recomputed."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unlearning.objectives.dropout import without_dropout

TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Dropout as modules, as a function in a block, as a function in the attention, and read from the configuration.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "opt": {
        **{"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"word_embed_proj_dim": 16, "dropout": 0.3, "attention_dropout": 0.3},
    },
    "llama": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "attention_dropout": 0.3,
    },
    "falcon": {
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"hidden_dropout": 0.3, "attention_dropout": 0.3},
    },
}
IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TOKENS, **CASES[kind])).double()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_eval_mode(kind: str, checkpointed: bool) -> None:
    model = build(kind)
    expected = gradients(model.eval())
    model.train()
    dropped = gradients(model)
    assert max((dropped[name] - each).abs().max().item() for name, each in expected.items()) > 1e-6
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    norm = next(module for name, module in block.named_modules() if "norm" in name or name.startswith("ln"))
    norm.register_forward_hook(lambda *_: runs.append(1))
    with without_dropout(model):
        quiet = gradients(model)
    for name, each in expected.items():
        torch.testing.assert_close(quiet[name], each, atol=1e-12, rtol=1e-9)
    assert len(runs) == (2 if checkpointed else 1)  # recomputed in the backward pass


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_module_gets_its_mode_back(checkpointed: bool) -> None:
    model = build("gpt2").train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), without_dropout(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes
    assert [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()] == functions
