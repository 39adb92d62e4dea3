"""Builders of bases and of adapters on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from tests.unlearning.helpers import build_tiny_llama
from unlearning import InputError
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.checkpoints.lora import add_adapter, save_adapter

TOKENS = torch.tensor([[5, 17, 300, 2, 9], [44, 45, 46, 0, 1]])


def build_gpt2() -> GPT2LMHeadModel:
    """Its projections are Conv1D: stored transposed, and tied embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def build_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return GPTNeoXForCausalLM(config).eval()


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "gpt2": build_gpt2,
    "neox": build_neox,
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def save_base(directory: Path, builder: Callable[[], PreTrainedModel] = build_tiny_llama) -> Path:
    builder().save_pretrained(directory)
    return directory


def train_adapter(directory: Path, base: Path | str, **options: Any) -> PreTrainedModel:
    """Train a moment on one line and save the adapter; returns the trained model, still unmerged."""
    model = load_weights(locate_checkpoint(base))
    add_adapter(model, **{"rank": 4, "alpha": 8, "base": str(base), **options})
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model.eval(), directory)
    return model


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewritten(path: Path, **changes: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load_weights(Path(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)
