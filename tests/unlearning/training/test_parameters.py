"""What trains and in which numbers: a choice of parameters, adapters, optimizers, precisions, tokenizers and chats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import flat_weights
from unlearning import InputError, train
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def moved(model: PreTrainedModel, start: PreTrainedModel) -> set[str]:
    before = dict(start.named_parameters())
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("npo", r"layers\.0\.mlp"),
        ("npo", "lm_head"),
        ("blur", "down_proj|norm"),
        ("rmu", "down_proj|norm"),
    ],
)
def test_only_the_named_parameters_move(method: str, pattern: str, model_dir: Path) -> None:
    """Not by a gradient and not by weight decay, which would shrink a frozen weight that the optimizer has."""
    settings = {**SHARED, "weight_decay": 0.5, "train_parameters": pattern}
    result = train(method, model=model_dir, **settings)
    start = build_tiny_llama()
    wanted = {name for name, _ in start.named_parameters() if re.search(pattern, name)}
    changed = moved(result.model, start)
    # RMU reads the output of the first block: gradients end there.
    assert changed == ({name for name in wanted if "layers.0." in name} if method == "rmu" else wanted)
    everything = {name for name, _ in start.named_parameters()}
    assert 0 < len(changed) < len(everything)
    if method == "npo":
        assert moved(train(method, model=model_dir, **SHARED).model, start) == everything


def test_a_choice_of_parameters_changes_what_is_clipped(model_dir: Path) -> None:
    """The norm is of the gradients that train, and the first loss is the same."""
    whole = train("npo", model=model_dir, **SHARED).history[0]
    part = train("npo", model=model_dir, train_parameters="mlp", **SHARED).history[0]
    assert part["loss"] == whole["loss"]
    assert 0 < part["grad_norm"] < whole["grad_norm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_parameters": "encoder"}, "`train_parameters` must match at least one of the 21 parameters"),
        ({"train_parameters": "("}, "`train_parameters` must be a regular expression, got '(': missing )"),
        ({"train_parameters": "mlp", "lora_rank": 2}, "`lora_rank` and `train_parameters`"),
        ({"lora_rank": 2, "lora_targets": "nothing"}, "got 'nothing'"),
        (
            {"optimizer": "sgd"},
            "`optimizer` must be adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, lion, got 'sgd'",
        ),
        ({"precision": "int8"}, "`precision` must be float32, bf16_mixed, fp16_mixed, bfloat16, got 'int8'"),
        ({"precision": "fp16_mixed"}, "fp16_mixed"),
        ({"seed": 2**32}, "`seed` must be below 4294967296, got 4294967296"),
        ({"chat": True}, "the tokenizer has no chat template; use `template`"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        train("npo", model=model_dir, output_dir=tmp_path / "run", **{**SHARED, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_the_loss_does_not_reach_are_refused(model_dir: Path) -> None:
    """RMU reads a block's output: nothing above it has a gradient."""
    for pattern in ("lm_head", r"layers\.1"):
        with pytest.raises(InputError) as error:
            train("rmu", model=model_dir, layer=0, train_parameters=pattern, **SHARED)
        assert "`train_parameters`" in str(error.value) and "the forget loss of rmu" in str(error.value)


def test_adapters_are_refused_where_whole_weights_are_needed(
    model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="`lora_rank` .* task_vector"):
        train("task_vector", model=model_dir, lora_rank=2, **SHARED)
    with pytest.raises(InputError, match="`model` must be a directory or a hub id to save an adapter"):
        model = build_tiny_llama()
        train("npo", model=model, tokenizer=tokenizer, lora_rank=2, output_dir=tmp_path / "run", **SHARED)


@pytest.mark.parametrize(("method", "adapted"), [("rmu", {"down_proj"}), ("circuit_breakers", None)])
def test_an_adapter_is_of_the_maps_that_the_method_trains(
    method: str, adapted: set[str] | None, model_dir: Path
) -> None:
    own = {"layer": 0} if method == "rmu" else {"layers": "0"}
    trained = train(method, model=model_dir, lora_rank=2, **own, **SHARED).model
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names and all(".layers.0." in name and ".lora_" in name for name in names)
    maps = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    assert maps == (adapted or everything)


@pytest.mark.parametrize("method", ["npo", "blur"])
def test_an_adapter_is_trained_saved_and_merged(method: str, model_dir: Path, tmp_path: Path) -> None:
    settings = {**SHARED, "learning_rate": 1e-2}
    out = tmp_path / "adapter"
    result = train(method, model=model_dir, output_dir=out, lora_rank=4, lora_alpha=8, **settings)
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert sorted(path.name for path in out.iterdir() if "token" not in path.name) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "unlearning.json",
    ]
    record = json.loads((out / "unlearning.json").read_text())
    base = load_weights(model_dir)
    assert record["base_weights"] == content_hash(base, name="base")
    ids = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = result.model(ids).logits
        assert (wanted - base(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(load_weights(out)(ids).logits, wanted, atol=1e-4, rtol=0)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(out)).eval()
        torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-4, rtol=0)
    assert "library_name: peft" in (out / "README.md").read_text()
    again = train(method, model=model_dir, output_dir=out, lora_rank=4, lora_alpha=8, **settings)
    assert again.already_done
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, wanted, atol=1e-4, rtol=0)


def test_the_best_adapter_is_kept(model_dir: Path, tmp_path: Path) -> None:
    settings = {**SHARED, "learning_rate": 3e-2, "lr_schedule": "constant", "max_steps": 8}
    kept = {"lora_rank": 4, "keep_best": "retain_nll"}
    result = train("npo", model=model_dir, output_dir=tmp_path / "run", **settings, **kept)
    values = {int(line["step"]): line["retain_nll"] for line in result.evaluations}
    best = min(values, key=lambda step: values[step])
    assert best == result.final["step"] and values[best] < values[0]
    short = train("npo", model=model_dir, **{**settings, "max_steps": best}, lora_rank=4)
    torch.testing.assert_close(flat_weights(result.model), flat_weights(short.model), atol=0, rtol=0)
