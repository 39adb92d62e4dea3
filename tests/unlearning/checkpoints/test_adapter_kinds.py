"""Adapters as other programs write them: each computes what peft computes, or is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from tests.unlearning.checkpoints.adapters import TOKENS, copied, logits, refused, rewritten, save_base, train_adapter
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.locate import base_of, is_adapter
from unlearning.checkpoints.lora import add_adapter, save_adapter


def trained_by_peft(directory: Path, base: Path, *, resize: int | None = None, **options: Any) -> Tensor:
    """Train a moment with peft itself, save the adapter as peft does, and return peft's own logits, not merged."""
    torch.manual_seed(1)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        start.resize_token_embeddings(resize, mean_resizing=False)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
    model = get_peft_model(start, config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    return logits(model)


def build_tied() -> PreTrainedModel:
    config = build_tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


SHARED = TOKENS[0, :3].tolist()


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"trainable_token_indices": SHARED},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_adapter_of_any_kind_computes_what_peft_computes(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """A merge into tied embeddings would change both ends of the model."""
    base = save_base(tmp_path / "base", build_tied if tied else build_tiny_llama)
    if "ensure_weight_tying" in options and not tied:
        return
    wanted = trained_by_peft(tmp_path / "adapter", base, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        merged = load_weights(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert (logits(merged) - logits(load_weights(base))).abs().max() > 1e-2  # and it does something
    merged.save_pretrained(tmp_path / "merged")  # tied or not, it is saved whole
    torch.testing.assert_close(logits(load_weights(tmp_path / "merged")), logits(merged), atol=1e-6, rtol=1e-6)


def test_tied_embeddings_that_no_adapter_touches_stay_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", build_tied)
    train_adapter(tmp_path / "adapter", base)
    merged = load_weights(tmp_path / "adapter")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("rows", [400, 370], ids=["more", "fewer"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["plain", "saved"])
def test_an_adapter_over_resized_embeddings(options: dict[str, Any], tied: bool, rows: int, tmp_path: Path) -> None:
    if tied and options:
        return
    base = save_base(tmp_path / "base", build_tied if tied else build_tiny_llama)
    wanted = trained_by_peft(tmp_path / "adapter", base, resize=rows, **options)
    with pytest.warns(UserWarning, match=f"was trained with {rows} embeddings, its base .* has 384"):
        merged = load_weights(tmp_path / "adapter")
    assert merged.config.vocab_size == rows
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
def test_an_adapter_that_lacks_some_of_its_embeddings_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained_by_peft(tmp_path / "adapter", base, resize=400, target_modules=["embed_tokens", "q_proj"])
    assert "was trained with 400 embeddings, its base" in refused(tmp_path / "adapter")


def test_an_adapter_of_a_quantized_base_is_merged_into_the_dequantized_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_base(tmp_path / "base")
    eight = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    eight.save_pretrained(tmp_path / "base8")
    with pytest.warns(UserWarning, match="they were dequantized"):
        load_weights(tmp_path / "base8").save_pretrained(tmp_path / "plain")
    trained = train_adapter(tmp_path / "adapter", tmp_path / "plain")
    rewritten(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base8"))
    with pytest.warns(UserWarning, match="base8: its weights are quantized"):
        merged = load_weights(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=1e-5)


def test_a_left_over_configuration_makes_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Full weights beside an adapter_config.json, which transformers would follow to another model."""
    path = copied(pair[0], tmp_path / "whole")
    shutil.copy(pair[1] / "adapter_config.json", path)
    assert not is_adapter(path)
    assert torch.equal(logits(load_weights(path)), logits(load_weights(pair[0])))
    (path / "adapter_config.json").write_text("{")
    assert torch.equal(logits(load_weights(path)), logits(load_weights(pair[0])))


def test_the_base_of_an_adapter_keeps_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    commit = "0123456789" * 4
    train_adapter(tmp_path / "adapter", base)
    model = load_weights(base)
    add_adapter(model, rank=2, alpha=4, base=f"owner/name@{commit}")
    save_adapter(model, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", commit)
    asked: list[str] = []
    monkeypatch.setattr("unlearning.checkpoints.locate._download", lambda name: asked.append(name) or base)
    assert base_of(tmp_path / "hub") == base
    assert asked == [f"owner/name@{commit}"]
