"""Streamed models: the same numbers as in memory, read once, one layer ahead, and nothing left behind."""

import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dissect.models.layer_reader import LayerReader
from dissect.models.streamed_model import open_streamed
from tests.dissect.helpers import build_model, change_weights
from tests.dissect.streaming_helpers import (
    BLOCKS,
    assert_walks_as,
    held,
    reader_threads,
    run_pass,
    save,
    save_pair,
    walk,
)
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError

HALVES = [torch.bfloat16, torch.float16, torch.float32]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.001)


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
    assert LayerReader([small], blocks="model.layers").min_weight_bytes() == 4 * 2 * layer
    half = open_streamed(save(tmp_path / "half", build_model("llama", vocab_size=16), dtype=torch.float16), name="half")
    assert LayerReader([half], blocks="model.layers").min_weight_bytes() == (4 + 2) * layer
    wide = open_streamed(
        save(tmp_path / "wide", build_model("llama", vocab_size=4096), dtype=torch.float16), name="wide"
    )
    assert LayerReader([wide], blocks="model.layers").min_weight_bytes() == 4096 * 32 * (4 + 2) + 32 * 4
    other = open_streamed(save(tmp_path / "other", build_model("llama", seed=1, vocab_size=16)), name="other")
    shared = 2 * 32  # norms are all ones
    assert LayerReader([small, other], blocks="model.layers").min_weight_bytes() == 4 * 2 * (2 * layer - shared)


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
    walking.close()
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
