"""Checkpoints on disk, walks over them, and what of a streamed model is in memory."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dissect.models.layer_reader import LayerReader
from dissect.models.streamed_model import StreamedModel
from tests.dissect.helpers import build_model, change_weights

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
    """Threads of readers and of hashing that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("layer-reader", "fingerprint"))]


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
