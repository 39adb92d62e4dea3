"""Opening a checkpoint without loading it: names on disk, what is refused, remembered hashes."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dissect.models.layer_reader import LayerReader
from dissect.models.streamed_model import open_streamed
from tests.dissect.helpers import build_model
from tests.dissect.streaming_helpers import assert_walks_as, edit, held, reader_threads, save, save_pair, walk
from unlearning.checkpoints import keys
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError


def assert_refused(path: Path, *phrases: str) -> None:
    with pytest.raises(InputError) as refused:
        open_streamed(path, name="the model")
    assert "\n" not in str(refused.value)
    assert all(phrase in str(refused.value) for phrase in phrases), str(refused.value)


# Names on disk.


def test_names_without_the_base_model_s_prefix_are_found(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("gpt2"))
    whole = load_weights(path)

    def as_on_the_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(3)}
        return masks | {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    edit(path, as_on_the_hub)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed = open_streamed(path, name="model")
    assert streamed.stored["transformer.h.0.ln_1.weight"] == "h.0.ln_1.weight"
    assert streamed.sha256 == content_hash(whole, name="model")
    assert_walks_as(streamed, whole, "transformer.h")


def load_by_transformers(path: Path) -> PreTrainedModel:
    """As transformers itself loads it, without the checks of `load_weights`."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("on_disk", "rules"),
    [("feed", {r"\.feed\.": ".mlp."}), ("mlp", {r"\.mlp\.": ".feed."})],
    ids=["a rule that renames", "a rule that misses the model"],
)
def test_names_follow_transformers_own_rules(
    on_disk: str, rules: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model", build_model("llama", tied=False))
    edit(path, lambda tensors: {name.replace(".mlp.", f".{on_disk}."): tensor for name, tensor in tensors.items()})
    monkeypatch.setattr(keys, "get_model_conversion_mapping", lambda hf: get_model_conversion_mapping(hf, rules))
    streamed = open_streamed(path, name="model")
    assert streamed.stored["model.layers.0.mlp.up_proj.weight"] == f"model.layers.0.{on_disk}.up_proj.weight"
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, key_mapping=rules)
    assert streamed.sha256 == content_hash(whole, name="model")
    assert content_hash(build_model("llama", tied=False), name="model") == streamed.sha256


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        lambda tensors: {
            "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor
            for name, tensor in tensors.items()
        },
    ],
    ids=["both stored", "both stored and different", "only the head stored"],
)
def test_embeddings_that_the_configuration_ties(
    rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(tmp_path / "model", build_model("llama", tied=True))
    edit(path, rewrite)
    whole, streamed = load_by_transformers(path), open_streamed(path, name="model")
    assert streamed.sha256 == content_hash(whole, name="model")
    seen = {}
    for _ in walk(LayerReader([streamed], blocks="model.layers")):
        seen |= {key: tensor.clone() for key, tensor in held(streamed).items()}
    assert seen.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in seen.items())


def test_experts_that_transformers_merges_while_loading_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    path = save(tmp_path / "model", MixtralForCausalLM(config))
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert expert in TensorFiles(path).tensors
    assert_refused(
        path,
        f"{path}: cannot be streamed: the tensor {expert} is stored in another layout than the model has",
        "`stream`",
    )


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    edit(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "1.mlp.up" not in name})
    with pytest.raises(InputError) as whole:
        load_weights(path)
    assert_refused(path, str(whole.value), "1 missing keys in its weights, such as model.layers.1.mlp.up_proj.weight")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    edit(path, lambda tensors: {**tensors, "model.norm.weight": torch.ones(31)})
    with pytest.raises(InputError) as whole:
        load_weights(path)
    assert_refused(path, str(whole.value), "model.norm.weight has shape (31,)", "wants (32,)")


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("gpt2"))
    edit(path, lambda tensors: {**tensors, "ln_f.weight": torch.ones(32)})
    assert_refused(path, "the tensors ln_f.weight and transformer.ln_f.weight are both transformer.ln_f.weight")


def test_a_tensor_without_a_place_is_warned_of_as_when_loading(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # which older checkpoints hold, and no warning is due
    edit(path, lambda tensors: {**tensors, "model.mystery": torch.ones(3), old: torch.ones(4)})
    with pytest.warns(UserWarning) as loading:
        load_weights(path)
    with pytest.warns(UserWarning, match="1 tensors of its weights .*model.mystery") as streaming:
        open_streamed(path, name="model")
    assert [str(one.message) for one in streaming] == [str(one.message) for one in loading]


def set_config(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    set_config(path, quantization_config={"quant_method": "fp8"})
    assert_refused(path, "cannot be streamed: its weights are quantized", "`stream`")


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    set_config(path, model_type="no-such-type")
    assert_refused(path, f"{path}: transformers cannot load it: its config.json: ", "no-such-type")


def test_values_that_are_not_finite_are_refused_every_time(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))

    def break_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
        return tensors

    edit(path, break_one)
    for _ in range(2):
        assert_refused(path, "the model: 1 of 1536 values of the tensor model.layers.2.mlp.up_proj.weight are NaN")
    assert reader_threads() == []


# Remembered hashes.


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"), shard="20KB")
    first = open_streamed(path, name="model")
    assert first.files.bytes_read == sum(tensor.n_bytes for tensor in first.files.tensors.values())
    second = open_streamed(path, name="model")
    assert second.files.bytes_read == 0
    assert (second.sha256, second.hashes) == (first.sha256, first.hashes)
    assert len(list((cache / "dissect" / "fingerprints").iterdir())) == 1

    file = first.tensor("model.layers.1.mlp.down_proj.weight").file
    before = file.stat()
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    third = open_streamed(path, name="model")
    assert third.files.bytes_read == first.files.bytes_read
    assert third.sha256 == content_hash(load_weights(path), name="model") != first.sha256
    assert {key for key in first.hashes if first.hashes[key] != third.hashes[key]} == {
        "model.layers.1.mlp.down_proj.weight"
    }


def test_two_checkpoints_do_not_share_a_memory(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, lambda name: "up_proj" in name)
    for path in paths:
        os.utime(path / "model.safetensors", ns=(10**18, 10**18))
    opened = [open_streamed(path, name=path.name) for path in paths * 2]
    assert [model.files.bytes_read > 0 for model in opened] == [True, True, False, False]
    for path, model in zip(paths * 2, opened, strict=True):
        assert model.sha256 == content_hash(load_weights(path), name=path.name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "files": [], "tensors": 3}']
)
def test_a_broken_memory_is_ignored_and_mended(content: str, tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    first = open_streamed(path, name="model")
    (file,) = (cache / "dissect" / "fingerprints").iterdir()
    file.write_text(content)
    assert open_streamed(path, name="model").sha256 == first.sha256
    assert open_streamed(path, name="model").files.bytes_read == 0


def test_a_memory_of_other_tensors_is_ignored(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    first = open_streamed(path, name="model")
    (file,) = (cache / "dissect" / "fingerprints").iterdir()
    record = json.loads(file.read_text())
    del record["tensors"]["model.norm.weight"]
    file.write_text(json.dumps(record))
    assert open_streamed(path, name="model").sha256 == first.sha256


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    cache.write_text("a file where the directory should be")
    for _ in range(2):
        assert open_streamed(path, name="model").sha256 == content_hash(load_weights(path), name="model")
