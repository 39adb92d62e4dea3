"""Streamed models: the same numbers as in memory, read once, one layer ahead, and nothing left behind."""

import json
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dissect.engine import streaming
from dissect.engine.streaming import LayerReader, StreamedModel, open_streamed
from tests.dissect.helpers import build_model, change_weights
from unlearning.checkpoints import content_hash, load_weights
from unlearning.errors import InputError
from unlearning.safetensors_files import TensorFiles

BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
    "gemma2": "model.layers",
    "phi3": "model.layers",
    "olmo2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
}
HALVES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds what another one hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, model: PreTrainedModel, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def save_pair(
    tmp_path: Path, chosen: Callable[[str], bool], *, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> tuple[Path, Path]:
    """An untied Llama, and the same with noise on the chosen weights."""
    base, unlearned = (build_model("llama", tied=False) for _ in range(2))
    change_weights(unlearned, chosen)
    paths = tmp_path / "base", tmp_path / "unlearned"
    for path, model in zip(paths, (base, unlearned), strict=True):
        save(path, model, dtype=dtype, shard=shard)
    return paths


def edit(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the one weight file of a checkpoint."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def held(model: StreamedModel) -> dict[str, Tensor]:
    """What of the state dict is in memory."""
    return {key: tensor for key, tensor in model.hf.state_dict(keep_vars=True).items() if not tensor.is_meta}


def walk(reader: LayerReader) -> Iterator[str]:
    """A whole pass, with the name of each stage while it is open."""
    with reader.embedding():
        yield "embedding"
    for layer in reader.blocks():
        yield f"block {layer}"
    with reader.head():
        yield "head"


def run_pass(reader: LayerReader) -> int:
    """The bytes that one pass reads."""
    before = reader.bytes_read
    for _ in walk(reader):
        pass
    return reader.bytes_read - before


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("layer-reader", "fingerprint"))]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.001)


def assert_refused(path: Path, *phrases: str) -> None:
    with pytest.raises(InputError) as refused:
        open_streamed(path, name="the model")
    assert "\n" not in str(refused.value)
    assert all(phrase in str(refused.value) for phrase in phrases), str(refused.value)


def assert_walks_as(streamed: StreamedModel, whole: PreTrainedModel, blocks: str) -> None:
    """Each stage holds just its part, equal to the whole model's; together they hold everything; then nothing."""
    expected = whole.state_dict()
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    inputs = {key for key in expected if whole.get_parameter(key) is whole.get_input_embeddings().weight}
    outputs = {key for key in expected if whole.get_parameter(key) is whole.get_output_embeddings().weight}
    outside = {key for key in expected if not key.startswith(blocks)}
    stages = {"embedding": outside - (set() if tied else outputs), "head": outside - (set() if tied else inputs)}
    for layer in range(3):
        stages[f"block {layer}"] = {key for key in expected if key.startswith(f"{blocks}.{layer}.")}
    assert set().union(*stages.values()) == set(expected)
    for stage in walk(LayerReader([streamed], blocks=blocks)):
        now = held(streamed)
        assert now.keys() == stages.pop(stage), stage
        for key, tensor in now.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key
            assert isinstance(tensor, torch.nn.Parameter)
    assert stages == {}
    assert held(streamed) == {}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", BLOCKS)
def test_a_walk_sees_the_loaded_model(family: str, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model(family), dtype=dtype, shard=shard)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard != "5GB")
    whole = load_weights(path)
    streamed = open_streamed(path, name="model")
    assert held(streamed) == {}
    assert not streamed.hf.training
    assert streamed.sha256 == content_hash(whole, name="model")
    assert_walks_as(streamed, whole, BLOCKS[family])
    buffers = dict(streamed.hf.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_put_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("gpt2"))
    assert_walks_as(open_streamed(path, name="model", dtype=dtype), load_weights(path, dtype=dtype), "transformer.h")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weights_are_put_on_a_gpu(family: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model(family), dtype=torch.bfloat16)
    streamed = open_streamed(path, name="model", device="cuda", dtype=torch.bfloat16)
    whole = load_weights(path, device="cuda", dtype=torch.bfloat16)
    assert {buffer.device.type for buffer in streamed.hf.buffers()} == {"cuda"}
    assert_walks_as(streamed, whole, BLOCKS[family])
    assert streamed.sha256 == content_hash(whole, name="model")


def test_a_walk_works_in_inference_mode_and_again_and_again(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"), dtype=torch.float16)
    streamed, whole = open_streamed(path, name="model"), load_weights(path)
    for _ in range(2):
        with torch.inference_mode():
            assert_walks_as(streamed, whole, "model.layers")
    assert_walks_as(streamed, whole, "model.layers")


def test_a_block_computes_while_it_is_in_place(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("gpt2"), dtype=torch.bfloat16)
    streamed, whole = open_streamed(path, name="model"), load_weights(path)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in LayerReader([streamed], blocks="transformer.h").blocks():
            ours = streamed.hf.get_submodule(f"transformer.h.{layer}")(hidden)
            assert torch.equal(ours, whole.get_submodule(f"transformer.h.{layer}")(hidden))


# What several models have in common.


def test_what_two_models_share_is_read_and_held_once(tmp_path: Path) -> None:
    def chosen(name: str) -> bool:
        return name.startswith("model.layers.1.mlp") or name == "lm_head.weight"

    models = [
        open_streamed(path, name=path.name) for path in save_pair(tmp_path, chosen, dtype=torch.bfloat16, shard="20KB")
    ]
    reader = LayerReader(models, blocks="model.layers")
    for _ in walk(reader):
        base, unlearned = map(held, models)
        assert base.keys() == unlearned.keys()
        for key in base:
            assert (base[key] is unlearned[key]) == (not chosen(key)), key
            assert torch.equal(base[key], unlearned[key]) == (not chosen(key)), key
    base_bytes = sum(2 * tensor.numel() for tensor in models[0].hf.parameters())
    changed = 3 * 32 * 48 + 384 * 32
    norm_again = 32  # the final norm is in place both before and after the blocks
    assert run_pass(reader) == base_bytes + 2 * changed + 2 * norm_again


def test_bytes_of_a_pass_over_one_tied_model(tmp_path: Path) -> None:
    model = open_streamed(save(tmp_path / "model", build_model("gpt2"), dtype=torch.bfloat16), name="model")
    block = 4 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 48 + 48) + (48 * 32 + 32)
    embeddings, positions, norm = 384 * 32, 128 * 32, 2 * 32
    assert run_pass(LayerReader([model], blocks="transformer.h")) == 2 * (
        3 * block + 2 * (embeddings + positions + norm)
    )


def test_the_same_model_twice_costs_nothing_more(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    model, again = open_streamed(path, name="model"), open_streamed(path, name="again")
    once = run_pass(LayerReader([model], blocks="model.layers"))
    assert run_pass(LayerReader([model, model], blocks="model.layers")) == once
    assert run_pass(LayerReader([model, again], blocks="model.layers")) == once


def test_equal_numbers_are_shared_whatever_their_dtype_on_disk(tmp_path: Path) -> None:
    narrow = save(tmp_path / "narrow", build_model("llama", tied=False), dtype=torch.bfloat16)
    wide = save(tmp_path / "wide", load_weights(narrow))
    models = [open_streamed(path, name=path.name) for path in (narrow, wide)]
    assert models[0].sha256 == models[1].sha256
    for _ in walk(LayerReader(models, blocks="model.layers")):
        first, second = map(held, models)
        assert all(first[key] is second[key] for key in first)


def test_differences_that_float32_does_not_hold_are_not_shared_away(tmp_path: Path) -> None:
    base, unlearned = (build_model("llama", tied=False, dtype=torch.float64) for _ in range(2))
    change_weights(unlearned, scale=1e-12)
    for name, model in (("base", base), ("unlearned", unlearned)):
        save(tmp_path / name, model, dtype=torch.float64)
    models = [open_streamed(tmp_path / name, name=name, dtype=torch.float64) for name in ("base", "unlearned")]
    key = "model.layers.0.mlp.down_proj.weight"
    assert models[0].hashes[key] == models[1].hashes[key]
    for _ in walk(LayerReader(models, blocks="model.layers")):
        for streamed, whole in zip(models, (base, unlearned), strict=True):
            assert all(torch.equal(tensor, whole.get_parameter(name)) for name, tensor in held(streamed).items())


def test_models_of_different_dtype_share_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    models = [open_streamed(path, name="model", dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for _ in walk(LayerReader(models, blocks="model.layers")):
        assert {tensor.dtype for tensor in held(models[0]).values()} == {torch.float32}
        assert {tensor.dtype for tensor in held(models[1]).values()} == {torch.float64}


def test_models_of_different_depth_do_not_walk_together(tmp_path: Path) -> None:
    models = [
        open_streamed(save(tmp_path / str(depth), build_model("llama", n_layers=depth)), name=str(depth))
        for depth in (2, 3)
    ]
    with pytest.raises(ValueError, match=r"different depth .*\[2, 3\]"):
        LayerReader(models, blocks="model.layers")


# Memory.


class Watched:
    """Reads whose memory is followed: each read array, by the layer that it belongs to, as long as it lives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakKeyDictionary[_Followed, int] = weakref.WeakKeyDictionary()
        self.read_of: list[int] = []
        self.widest = 0
        original = TensorFiles.read

        def read(files: TensorFiles, name: str) -> Tensor:
            values = np.array(original(files, name).numpy()).view(_Followed)
            layer = int(name.split(".")[2])
            self.alive[values] = layer
            self.read_of.append(layer)
            self.widest = max(self.widest, len(set(self.alive.values())))
            return torch.from_numpy(values)

        monkeypatch.setattr(TensorFiles, "read", read)

    def layers(self) -> set[int]:
        return set(self.alive.values())


class _Followed(np.ndarray):
    """An array that can be a key: torch's storage keeps it alive as long as any tensor has its memory."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return self is other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_layer_is_in_place_and_one_ahead_and_no_more(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [open_streamed(path, name=path.name) for path in save_pair(tmp_path, lambda _name: True, dtype=dtype)]
    reader = LayerReader(models, blocks="model.layers")
    tensors_of_a_layer = 2 * 9
    watched = Watched(monkeypatch)
    for layer in reader.blocks():
        ahead = min(layer + 2, reader.n_layers)
        wait_until(lambda: len(watched.read_of) == ahead * tensors_of_a_layer)  # noqa: B023
        time.sleep(0.02)  # in which a thread that ran on would
        assert watched.read_of == [number for number in range(ahead) for _ in range(tensors_of_a_layer)]
        # Stored as it is computed, a value is in place itself; else it was let go when it was converted.
        in_place = {layer} if dtype == torch.float32 else set()
        assert watched.layers() == in_place | ({layer + 1} if layer + 1 < reader.n_layers else set())
    assert watched.layers() == set()
    assert watched.widest <= 2


def test_least_memory_counted_by_hand(tmp_path: Path) -> None:
    key_value = 32 * 16
    layer = 2 * 32 * 32 + 2 * key_value + 3 * 32 * 48 + 2 * 32
    small = open_streamed(save(tmp_path / "small", build_model("llama", vocab_size=16)), name="small")
    assert LayerReader([small], blocks="model.layers").least_memory() == 4 * 2 * layer
    half = open_streamed(save(tmp_path / "half", build_model("llama", vocab_size=16), dtype=torch.float16), name="half")
    assert LayerReader([half], blocks="model.layers").least_memory() == (4 + 2) * layer
    wide = open_streamed(
        save(tmp_path / "wide", build_model("llama", vocab_size=4096), dtype=torch.float16), name="wide"
    )
    assert LayerReader([wide], blocks="model.layers").least_memory() == 4096 * 32 * (4 + 2) + 32 * 4
    other = open_streamed(save(tmp_path / "other", build_model("llama", seed=1, vocab_size=16)), name="other")
    shared = 2 * 32  # norms are all ones
    assert LayerReader([small, other], blocks="model.layers").least_memory() == 4 * 2 * (2 * layer - shared)


# However it ends.


def test_a_walk_that_is_left_early_leaves_nothing_behind(tmp_path: Path) -> None:
    model = open_streamed(save(tmp_path / "model", build_model("llama")), name="model")
    reader = LayerReader([model], blocks="model.layers")
    for layer in reader.blocks():
        assert reader_threads()
        if layer == 1:
            break
    assert (held(model), reader_threads()) == ({}, [])
    with pytest.raises(KeyboardInterrupt):
        for _ in reader.blocks():
            raise KeyboardInterrupt
    assert (held(model), reader_threads()) == ({}, [])
    for stage in (reader.embedding(), reader.head()):
        with pytest.raises(KeyboardInterrupt), stage:
            assert held(model)
            raise KeyboardInterrupt
        assert held(model) == {}
    assert_walks_as(model, load_weights(tmp_path / "model"), "model.layers")


def test_a_walk_that_is_left_waits_for_one_tensor_and_not_for_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_streamed(save(tmp_path / "model", build_model("llama")), name="model")
    go_on, begun, read = threading.Event(), threading.Event(), TensorFiles.read
    names: list[str] = []

    def slow(files: TensorFiles, name: str) -> Tensor:
        names.append(name)
        if name.startswith("model.layers.1."):
            begun.set()
            assert go_on.wait(10)
        return read(files, name)

    monkeypatch.setattr(TensorFiles, "read", slow)
    walking = LayerReader([model], blocks="model.layers").blocks()
    next(walking)
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    walking.close()  # type: ignore[attr-defined]
    assert sum(name.startswith("model.layers.1.") for name in names) == 1
    assert (held(model), reader_threads()) == ({}, [])


@pytest.mark.parametrize("broken", ["removed", "cut"])
def test_an_error_while_reading_ahead_comes_at_its_layer_and_names_the_file(broken: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"), shard="8KB")
    model = open_streamed(path, name="model")
    file = model.tensor("model.layers.2.mlp.up_proj.weight").file
    assert all(model.tensor(key).file != file for key in model.stored if not key.startswith("model.layers.2."))
    if broken == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5000])
    seen = []
    with pytest.raises(InputError, match=f"^{file}: (cannot be read: No such file|cut short within the tensor model)"):
        for layer in LayerReader([model], blocks="model.layers").blocks():
            seen.append(layer)
    assert seen == [0, 1]
    assert (held(model), reader_threads()) == ({}, [])


def test_an_error_in_a_stage_leaves_nothing_in_place(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("neox"), shard="8KB")
    model = open_streamed(path, name="model")
    model.tensor("lm_head.weight").file.unlink()
    reader = LayerReader([model], blocks="gpt_neox.layers")
    with reader.embedding():
        assert held(model)
    with pytest.raises(InputError, match="cannot be read: No such file"), reader.head():
        raise AssertionError("entered")
    assert held(model) == {}


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
    monkeypatch.setattr(streaming, "get_model_conversion_mapping", lambda hf: get_model_conversion_mapping(hf, rules))
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
        f"{path}: cannot be streamed: the tensor {expert} is stored in another layout than the model has; "
        "load it whole (leave --stream out)",
    )


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    edit(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "1.mlp.up" not in name})
    with pytest.raises(InputError) as whole:
        load_weights(path)
    assert_refused(path, str(whole.value), "1 missing keys in its weights, as model.layers.1.mlp.up_proj.weight")


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
    with pytest.warns(UserWarning, match="1 tensors of its weights have no place .* as model.mystery") as streaming:
        open_streamed(path, name="model")
    assert [str(one.message) for one in streaming] == [str(one.message) for one in loading]


def set_config(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    set_config(path, quantization_config={"quant_method": "fp8"})
    assert_refused(path, "cannot be streamed: its weights are quantized; load it whole (leave --stream out)")


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", build_model("llama"))
    set_config(path, model_type="no-such-type")
    assert_refused(path, f"{path}: transformers cannot build it: ", "no-such-type")


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
