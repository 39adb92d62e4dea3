"""Tensors read one by one from safetensors files, and the hashes made of them."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError

EVERY_KIND: dict[str, Tensor] = {
    "bool": torch.tensor([True, False, True]),
    "int64": torch.arange(-3, 3),
    "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    "float16": torch.linspace(-1, 1, 7).half(),
    "bfloat16": torch.linspace(-1, 1, 30).bfloat16().view(2, 3, 5),
    "float32": torch.linspace(-1, 1, 12).view(3, 4),
    "float64": torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3),
    "large": torch.arange(50_000.0),
    "scalar": torch.tensor(0.25),
    "nothing": torch.empty(0, 4),
}


def save_checkpoint(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return path


def save_shards(path: Path) -> Path:
    build_tiny_llama().save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def test_every_data_type_and_shape_is_read_as_it_was_saved(tmp_path: Path) -> None:
    files = TensorFiles(save_checkpoint(tmp_path / "model", EVERY_KIND))
    assert files.tensors.keys() == EVERY_KIND.keys()
    for name, saved in EVERY_KIND.items():
        stored, read = files.tensors[name], files.read(name)
        assert (stored.shape, stored.dtype) == (tuple(saved.shape), saved.dtype)
        assert stored.n_values == saved.numel()
        assert stored.n_bytes == saved.numel() * saved.element_size()
        assert (read.shape, read.dtype) == (saved.shape, saved.dtype)
        assert read.flatten().view(torch.uint8).tolist() == saved.flatten().view(torch.uint8).tolist()


def test_shards_hold_what_safetensors_reads_from_them(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "model")
    theirs = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    files = TensorFiles(path)
    assert files.tensors.keys() == theirs.keys()
    assert {file.name for file in files.files} == {file.name for file in path.glob("*.safetensors")}
    for name, tensor in theirs.items():
        assert torch.equal(files.read(name), tensor)
        assert files.tensors[name].file == shard_of(path, name)


def test_bytes_read_counts_tensors_and_not_headers(tmp_path: Path) -> None:
    files = TensorFiles(save_checkpoint(tmp_path / "model", EVERY_KIND))
    assert files.bytes_read == 0
    files.read("float32")
    assert files.bytes_read == 12 * 4
    files.read("bfloat16")
    files.read("bfloat16")
    assert files.bytes_read == 12 * 4 + 2 * 30 * 2
    assert sum(len(piece) for piece in files.pieces("large", 999)) == 50_000
    assert files.bytes_read == 12 * 4 + 2 * 30 * 2 + 50_000 * 4


def test_bytes_read_loses_none_between_threads(tmp_path: Path) -> None:
    files = TensorFiles(save_shards(tmp_path / "model"))
    names = sorted(files.tensors) * 20
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(files.read, names))
    assert files.bytes_read == sum(tensor.nbytes for tensor in read)


@pytest.mark.parametrize("size", [1, 7, 30, 31])
def test_pieces_are_the_values_in_order(size: int, tmp_path: Path) -> None:
    files = TensorFiles(save_checkpoint(tmp_path / "model", EVERY_KIND))
    pieces = list(files.pieces("bfloat16", size))
    assert torch.equal(torch.cat(pieces), EVERY_KIND["bfloat16"].flatten())
    assert {len(piece) for piece in pieces[:-1]} <= {size}
    assert list(files.pieces("nothing", size)) == []


def test_what_was_read_no_longer_needs_the_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", EVERY_KIND)
    read = TensorFiles(path).read("large")
    (path / "model.safetensors").write_bytes(b"")  # under a mapping, the next line would be the process's last
    assert torch.equal(read, EVERY_KIND["large"])


def test_two_reads_share_no_memory(tmp_path: Path) -> None:
    files = TensorFiles(save_checkpoint(tmp_path / "model", EVERY_KIND))
    first = files.read("large")
    first.zero_()
    assert torch.equal(files.read("large"), EVERY_KIND["large"])


def test_one_file_is_preferred_to_an_index_as_transformers_does(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "model")
    save_file({"alone": torch.ones(2)}, path / "model.safetensors")
    assert TensorFiles(path).tensors.keys() == {"alone"}


def remove_shard(path: Path) -> str:
    shard = shard_of(path, "model.norm.weight")
    shard.unlink()
    return f"{shard}: missing, though model.safetensors.index.json names it; copy it again"


def cut_shard(path: Path) -> str:
    shard = shard_of(path, "model.norm.weight")
    shard.write_bytes(shard.read_bytes()[:-1])
    return f"{shard}: cut short or not safetensors"


def rename_tensor(path: Path) -> str:
    shard = shard_of(path, "model.norm.weight")
    save_file({name.replace("norm", "other"): tensor for name, tensor in load_file(shard).items()}, shard)
    named = next(name for name in json_map(path) if "norm" in name and json_map(path)[name] == shard.name)
    return f"{shard}: lacks the tensor {named}, which model.safetensors.index.json places there; copy both again"


def json_map(path: Path) -> dict[str, str]:
    return json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]


def rename_file(path: Path) -> str:
    (path / "model.safetensors.index.json").unlink()
    return f"{path}: no model.safetensors and no model.safetensors.index.json; name the weight file so"


def unknown_type(path: Path) -> str:
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return f"{path / 'model.safetensors'}: the tensor x has the data type F8_E8M0, which is not read here"


@pytest.mark.parametrize("break_it", [remove_shard, cut_shard, rename_tensor, rename_file, unknown_type])
def test_a_broken_checkpoint_is_refused_by_file(break_it: Callable[[Path], str], tmp_path: Path) -> None:
    path = save_shards(tmp_path / "model")
    expected = break_it(path)
    with pytest.raises(InputError) as refused:
        TensorFiles(path)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


def cut_in_the_tensor(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-1000])
    return f"{file}: cut short within the tensor large; copy it again"


def cut_before_the_tensor(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:8])
    return f"{file}: cut short within the tensor large; copy it again"


def remove_file(file: Path) -> str:
    file.unlink()
    return f"{file}: cannot be read: No such file or directory; check the disk, or copy it again"


def fail_as_a_broken_disk(file: Path) -> str:
    file.unlink()
    file.symlink_to("/proc/self/mem")  # reading where nothing is mapped is an input/output error
    return f"{file}: cannot be read: Input/output error; check the disk, or copy it again"


@pytest.mark.parametrize(
    "break_it",
    [
        cut_in_the_tensor,
        cut_before_the_tensor,
        remove_file,
        pytest.param(fail_as_a_broken_disk, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")),
    ],
)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_file_that_breaks_while_it_is_open_is_named(
    break_it: Callable[[Path], str], in_pieces: bool, tmp_path: Path
) -> None:
    files = TensorFiles(save_checkpoint(tmp_path / "model", {"large": EVERY_KIND["large"]}))
    expected = break_it(files.files[0])
    with pytest.raises(InputError) as refused:
        for _ in files.pieces("large", 1000) if in_pieces else [files.read("large")]:
            pass
    assert str(refused.value) == expected
