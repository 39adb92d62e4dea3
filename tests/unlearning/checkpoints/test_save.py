"""Checkpoints that transformers 4 and 5 read alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from tests.unlearning.checkpoints.adapters import copied, logits
from tests.unlearning.helpers import build_examples
from unlearning import train
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.save import complete_config, write_tokenizer

SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CLASSIC: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 500000.0, "rope_scaling": None}),
    "llama 3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "qwen2, linear": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {"rope_theta": 1e6}),
    "phi": ("phi", {"rope_theta": 20000.0, "rope_scaling": None, "partial_rotary_factor": 0.25}),
    "stablelm": ("stablelm", {"rope_theta": 20000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}),
    "neox": ("gpt_neox", {"rotary_emb_base": 30000, "rotary_pct": 0.5}),
    "gemma3": (
        "gemma3_text",
        {"rope_theta": 2e6, "rope_local_base_freq": 20000.0, "rope_scaling": None, "head_dim": 8},
    ),
}
"""A configuration as transformers 4 wrote it, by family."""


def write_config(directory: Path, content: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def positions(config: PretrainedConfig) -> Any:
    return config.get_text_config().rope_parameters


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("start", ["classic", "none"])
def test_rotary_fields_are_written_for_both_versions(name: str, start: str, tmp_path: Path) -> None:
    kind, fields = CLASSIC[name]
    classic = write_config(tmp_path / "classic", {"model_type": kind, **SMALL, **fields})
    config = AutoConfig.from_pretrained(classic)
    config.save_pretrained(tmp_path / "out")
    assert not fields.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys() - {"head_dim"}
    complete_config(tmp_path / "out", classic if start == "classic" else "")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # transformers 4 reads the classic fields, 5 reads its own; both mean the start's numbers.
    for field, value in fields.items():
        kept = written.get(field)
        if field == "rope_scaling" and value is not None:
            assert value.items() <= kept.items()
        else:
            assert kept == value, field
    assert positions(AutoConfig.from_pretrained(tmp_path / "out")) == positions(config)


def test_every_field_survives_and_writing_twice_changes_nothing(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    complete_config(tmp_path, "")
    once = (tmp_path / "config.json").read_text()
    assert before.items() <= json.loads(once).items()
    complete_config(tmp_path, tmp_path)
    assert (tmp_path / "config.json").read_text() == once
    complete_config(tmp_path / "nowhere", "")  # an adapter has no config.json


def test_models_without_rotary_embeddings_get_no_fields(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    complete_config(tmp_path, "")
    assert not [field for field in json.loads((tmp_path / "config.json").read_text()) if "rope" in field]


def test_a_trained_model_is_the_same_under_both_versions(model_dir: Path, tmp_path: Path) -> None:
    """A start as transformers 4 wrote it: its fields and its tokenizer's files stay."""
    start = copied(model_dir, tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    del config["rope_parameters"]
    write_config(start, config | {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"})
    named = json.loads((start / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (start / "tokenizer_config.json").write_text(json.dumps(named, indent=3))
    (start / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    out = tmp_path / "out"
    trained = train("ga", model=start, forget=build_examples(4), max_steps=1, output_dir=out, progress=False)
    written = json.loads((out / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, LLAMA3)
    assert written["rope_parameters"]["rope_theta"] == 500000.0
    assert written["torch_dtype"] == written["dtype"] == "float32"
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / file).read_bytes() == (start / file).read_bytes()
    assert torch.equal(logits(load_weights(out)), logits(trained.model))
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(logits(plain), logits(trained.model))


def test_a_tokenizer_that_was_made_in_memory_is_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_tokenizer(tokenizer, tmp_path / "none", None)
    write_tokenizer(tokenizer, tmp_path / "empty", tmp_path)
    for name in ("none", "empty"):
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert again.get_vocab() == tokenizer.get_vocab()
