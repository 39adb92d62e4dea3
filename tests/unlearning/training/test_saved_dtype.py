"""The data type of a trained model's files: the checkpoint's own, or the one that was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import at_call, flat_weights, interrupt
from unlearning import InputError, train
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.storage import DTYPES

SETTINGS: dict[str, Any] = {
    "forget": build_examples()[:4],
    "retain": build_examples()[4:],
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "progress": False,
    "device": "cpu",
}


def checkpoint(directory: Path, dtype: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    build_tiny_llama().to(DTYPES[dtype]).save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)
    return directory


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_whole(directory: Path, dtype: str, model: PreTrainedModel) -> None:
    """Files, configuration, record, and what the run returned say the same."""
    tensors = on_disk(directory)
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}
    config = json.loads((directory / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert json.loads((directory / "unlearning.json").read_text())["saved_dtype"] == dtype
    assert torch.equal(flat_weights(load_weights(directory)), flat_weights(model))
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert plain.dtype == DTYPES[dtype] and torch.equal(flat_weights(plain), flat_weights(model))


@pytest.mark.parametrize(
    ("start", "asked", "saved"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float16"),
    ],
)
def test_full_weights(
    start: str, asked: str | None, saved: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The saved model is the rounded one of a run that saves nothing, and the last metrics are its own."""
    base = checkpoint(tmp_path / "base", start, tokenizer)
    result = train("npo", model=base, output_dir=tmp_path / "out", save_dtype=asked, **SETTINGS)
    exact = flat_weights(train("npo", model=base, **SETTINGS).model)
    assert torch.equal(flat_weights(result.model), exact.to(DTYPES[saved]).float())
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert_whole(tmp_path / "out", saved, result.model)
    # Against the metrics before the first step of a run that begins with the saved model.
    again = train("ga", model=tmp_path / "out", **{**SETTINGS, "max_steps": 1})
    for name, value in again.evaluations[0].items():
        if name.endswith(("probability", "nll")):
            assert result.final[name] == pytest.approx(value, rel=1e-5), name
    done = train("npo", model=base, output_dir=tmp_path / "out", save_dtype=asked, **SETTINGS)
    assert done.already_done and torch.equal(flat_weights(done.model), flat_weights(result.model))
    assert done.final == result.final


def test_a_loaded_model_has_the_data_type_that_it_had_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_tiny_llama().bfloat16()
    result = train("npo", model=model, tokenizer=tokenizer, output_dir=tmp_path / "out", **SETTINGS)
    assert_whole(tmp_path / "out", "bfloat16", result.model)


def test_bfloat16_weights_of_a_float32_checkpoint_are_saved_in_float32(model_dir: Path, tmp_path: Path) -> None:
    result = train("npo", model=model_dir, output_dir=tmp_path / "out", precision="bfloat16", **SETTINGS)
    assert_whole(tmp_path / "out", "float32", result.model)


@pytest.mark.parametrize("asked", [None, "bfloat16", "float16"])
def test_an_adapter_and_what_it_is_merged_into(
    asked: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = checkpoint(tmp_path / "base", "bfloat16", tokenizer)
    result = train("npo", model=base, output_dir=tmp_path / "lora", lora_rank=2, save_dtype=asked, **SETTINGS)
    dtype = asked or "float32"
    tensors = on_disk(tmp_path / "lora")
    assert len(tensors) > 2 and {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}
    assert json.loads((tmp_path / "lora" / "unlearning.json").read_text())["saved_dtype"] == dtype
    inside = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in result.model.named_parameters()
        if parameter.requires_grad
    }
    assert all(torch.equal(inside[name.removeprefix("base_model.model.")], t.float()) for name, t in tensors.items())
    # A run that begins with the adapter merged into its base has the base's data type.
    merged = train("npo", model=tmp_path / "lora", output_dir=tmp_path / "merged", **SETTINGS)
    assert_whole(tmp_path / "merged", "bfloat16", merged.model)


def test_shards_are_converted_one_by_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "base", "bfloat16", tokenizer)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda *args, **kw: save(*args, **{**kw, "max_shard_size": "60KB"})
    )
    result = train("npo", model=base, output_dir=tmp_path / "out", **SETTINGS)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {tmp_path / "out" / name for name in index["weight_map"].values()}
    assert len(files) > 1 and files == set((tmp_path / "out").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in on_disk(tmp_path / "out").values())
    assert_whole(tmp_path / "out", "bfloat16", result.model)


@pytest.mark.parametrize("options", [{}, {"keep_best": "forget_nll", "eval_every": 1}], ids=str)
def test_a_resumed_run_saves_the_same(
    options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints hold float32 weights: a rounded one would go on elsewhere."""
    base = checkpoint(tmp_path / "base", "bfloat16", tokenizer)
    settings = {**SETTINGS, **options, "save_every": 1}
    whole = train("npo", model=base, output_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        at_call(patched, "npo", 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("npo", model=base, output_dir=tmp_path / "run", **settings)
    kept = on_disk(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    with pytest.raises(InputError, match="save_dtype is None there, 'float32' now"):
        train("npo", model=base, output_dir=tmp_path / "run", resume=True, save_dtype="float32", **settings)
    resumed = train("npo", model=base, output_dir=tmp_path / "run", resume=True, **settings)
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    assert (resumed.final, resumed.evaluations) == (whole.final, whole.evaluations)
    assert_whole(tmp_path / "run", "bfloat16", resumed.model)


def test_a_weight_beyond_float16_is_saved_in_float32(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The run is not lost: it would be infinite in the file."""
    model = build_tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    with pytest.warns(UserWarning, match="beyond what float16 can hold.*float32"):
        result = train(
            "ga", model=model, tokenizer=tokenizer, output_dir=tmp_path / "out", save_dtype="float16", **SETTINGS
        )
    assert_whole(tmp_path / "out", "float32", result.model)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int8", "`save_dtype` must be float32, bfloat16, float16 or none, got 'int8'"),
        ("fp16", "`save_dtype` must be float32, bfloat16, float16 or none, got 'fp16'"),
        ("", "`save_dtype` must be float32, bfloat16, float16 or none, got ''"),
        (16, "`save_dtype` must be float32, bfloat16, float16 or none, got 16"),
        (torch.float16, "`save_dtype` must be float32, bfloat16, float16 or none, got torch.float16"),
        ("bfloat16", "`save_dtype` needs a directory. Give `output_dir`."),
    ],
)
def test_bad_values_are_refused(value: Any, message: str, model_dir: Path) -> None:
    with pytest.raises(InputError) as error:
        train("npo", model=model_dir, save_dtype=value, **SETTINGS)
    assert str(error.value) == message
