"""Expressions in an adapter's configuration: they choose what peft chooses, and none can hang."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.unlearning.checkpoints.adapters import logits, refused, rewritten, save_base
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_weights
from unlearning.common import patterns

ENDLESS = r"([\w.]+\s?)+!"


def trained(directory: Path, base: Path, **options: Any) -> Path:
    """Save an adapter whose B is not zero, as peft does."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=2, **options))
    model.peft_config["default"].base_model_name_or_path = str(base)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": r"model\.layers\.1\.[a-z_.]+_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*_proj", "exclude_modules": r".*layers\.0.*"},
        {"target_modules": r".*_proj", "rank_pattern": {r".*q_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    ],
)
def test_an_adapter_of_expressions_computes_what_peft_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", build_tiny_llama)
    adapter = trained(tmp_path / "adapter", base, **options)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.allclose(logits(theirs), logits(plain), atol=1e-3)
    assert torch.allclose(logits(load_weights(adapter)), logits(theirs), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"target_modules": ENDLESS}, "matches no module"),
        ({"target_modules": r"(.*a){30}$"}, "target_modules"),
        ({"target_modules": "(a{9999}){9999}"}, "longer than"),
        ({"target_modules": ".*("}, "must be a regular expression"),
        ({"target_modules": "(?R)"}, "Python's"),
        ({"exclude_modules": "a{999999999}"}, "`exclude_modules` must be a regular expression"),
        ({"rank_pattern": {ENDLESS: 3}}, "rank_pattern must hold names"),
        ({"alpha_pattern": {r".*.*.*.*.*x": 3}}, "alpha_pattern must hold names"),
        ({"modules_to_save": [r"(\w+)*!"]}, "modules_to_save must hold names"),
        ({"layers_pattern": ENDLESS, "layers_to_transform": [0]}, "layers_pattern must hold names"),
    ],
)
def test_an_expression_without_end_is_refused_in_time(
    tmp_path: Path, changes: dict[str, Any], phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.1)
    base = save_base(tmp_path / "base", build_tiny_llama)
    adapter = trained(tmp_path / "adapter", base, target_modules=["q_proj"])
    rewritten(adapter, **changes)
    started = time.process_time()
    message = refused(adapter)
    assert phrase in message and str(adapter / "adapter_config.json") in message
    assert time.process_time() - started < 5
