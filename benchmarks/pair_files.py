"""A random bfloat16 pair on disk, written shard by shard, so that it may be larger than memory."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.models import NOISE, build_config, build_tokenizer
from benchmarks.shapes import Shape
from unlearning.common.errors import InputError
from unlearning.common.runs import write_bytes, write_json

SHARD_BYTES = 10**9
"""Of each model: two shards are in memory while a pair is written."""

_STD = 0.02
_BYTES = torch.bfloat16.itemsize
_FORMAT = 1


@dataclass(frozen=True)
class PairFiles:
    """A pair on disk with its questions.

    Attributes:
        folder: Directory of the pair.
    """

    folder: Path

    @property
    def base(self) -> Path:
        """The base model's directory."""
        return self.folder / "base"

    @property
    def unlearned(self) -> Path:
        """The unlearned model's directory."""
        return self.folder / "unlearned"

    @property
    def weight_bytes(self) -> int:
        """Size of one model's weights."""
        return sum(file.stat().st_size for file in self.base.glob("*.safetensors"))

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder)


def write_pair(
    shape: Shape,
    folder: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> PairFiles:
    """Write a random base and the base with noise on every matrix, unless the folder holds this pair already.

    Args:
        shape: Shape of the models.
        folder: Gets `base`, `unlearned` and, last, `pair.json`.
        seed: Random seed of the weights.
        shard_bytes: Largest file of a model; a single tensor may be larger.
        advance: Called with the number of bytes that were written, counting both models.

    Returns:
        The paths of the pair.

    Raises:
        InputError: The folder holds something else, or the disk has no room.
    """
    marker = folder / "pair.json"
    files = PairFiles(folder)
    wanted = {"format": _FORMAT, "seed": seed, "shard_bytes": shard_bytes, "shape": model_part(shape)}
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) == wanted:
            return files
        raise InputError(f"{folder}: holds another pair; remove it or name another --disk")
    sizes = tensor_sizes(shape)
    total = sum(size.numel() for size in sizes.values()) * _BYTES
    for old in folder.glob("*/model-*.safetensors"):  # of a writer that was stopped
        old.unlink()
    check_room(folder, 2 * total)
    shards = plan_shards(sizes, shard_bytes)
    for directory in (files.base, files.unlearned):
        directory.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(shards):
        base, unlearned = {}, {}
        for name in names:
            base[name], unlearned[name] = random_tensors(name, sizes[name], seed)
        for directory, tensors in ((files.base, base), (files.unlearned, unlearned)):
            save_file(tensors, directory / _file_name(number, len(shards)), metadata={"format": "pt"})
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    weight_map = {name: _file_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
    config, tokenizer = build_config(shape), build_tokenizer(shape.vocab)
    config.dtype = torch.bfloat16
    for directory in (files.base, files.unlearned):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    write_json(marker, wanted)
    return files


def model_part(shape: Shape) -> dict[str, int]:
    """Return the fields of a shape that the weights depend on."""
    asked = ("name", "prompts", "tokens", "answer")
    return {name: value for name, value in asdict(shape).items() if name not in asked}


def tensor_sizes(shape: Shape) -> dict[str, torch.Size]:
    """Return names and sizes of the model's tensors, layer by layer as transformers saves them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(build_config(shape))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def plan_shards(sizes: dict[str, torch.Size], shard_bytes: int) -> list[list[str]]:
    """Cut the tensors, in order, into files of at most `shard_bytes`, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        size_bytes = size.numel() * _BYTES
        if shards[-1] and filled + size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_bytes
    return shards


def random_tensors(name: str, size: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a tensor of the base and of the unlearned model from `name` and `seed`; norms are ones in both."""
    if len(size) == 1:
        ones = torch.ones(size, dtype=torch.bfloat16)
        return ones, ones.clone()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    base = torch.randn(size, generator=generator).mul_(_STD)
    kept = base.bfloat16()
    return kept, base.add_(torch.randn(size, generator=generator), alpha=NOISE * _STD).bfloat16()


def check_room(folder: Path, needed: int) -> None:
    """Check that the disk has room.

    Args:
        folder: Where the files will go.
        needed: Bytes of the files.

    Raises:
        InputError: Less than 1.05 times `needed` is free.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        raise InputError(
            f"{folder}: the pair takes {needed * 1.05 / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "name a larger place with --disk, or a smaller --shape"
        )


def write_questions(path: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Write prompts and answers of the shape's numbers of tokens, for a tokenizer of one token per word."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(shape.prompts):
        ids = torch.randint(1, shape.vocab, (shape.tokens,), generator=generator).tolist()
        words = [f"w{token}" for token in ids]
        record = {"prompt": " ".join(words[: -shape.answer]), "answer": " ".join(words[-shape.answer :])}
        lines.append(json.dumps(record) + "\n")
    write_bytes(path, "".join(lines).encode())
    return path


def _file_name(number: int, of: int) -> str:
    return f"model-{number + 1:05d}-of-{of:05d}.safetensors"
