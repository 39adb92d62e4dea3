"""The data type that weights are stored in: a checkpoint's own, and that of a trained model."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.checkpoints.locate import quantization, read_json, stored_headers, weights_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types that a trained model is stored in, by the name that the user types."""

_ON_DISK = {"BF16": "bfloat16", "F16": "float16"}


def stored_dtype(path: Path, *, allow_pickle: bool = False) -> str:
    """Return the data type in which a checkpoint stores most of its weights.

    Args:
        path: Directory of the checkpoint; of an adapter, its base's data type is returned.
        allow_pickle: Read pickled weights if there are no safetensors.

    Returns:
        A name in `DTYPES`; float32 for wider and for quantized weights, which are computed with in float32.
    """
    path = weights_directory(path)
    if quantization(read_json(path), path) is not None:
        return "float32"
    sizes: Counter[str] = Counter()
    for header in stored_headers(path, allow_pickle=allow_pickle).values():
        sizes[_ON_DISK.get(header.dtype, "float32")] += header.n_values
    return sizes.most_common(1)[0][0]


def dtype_in_memory(model: PreTrainedModel) -> str:
    """Return the data type of most of a model's weights: a name in `DTYPES`, float32 for wider ones."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[names.get(parameter.dtype, "float32")] += parameter.numel()
    return sizes.most_common(1)[0][0]


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the floats that are saved of a model, sharing its memory: all of them, or of an adapter what trains."""
    if hasattr(model, "peft_config"):
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def fits(model: PreTrainedModel, dtype: str) -> bool:
    """Return whether all that is saved of a model is finite in a data type; float16 ends at 65 504."""
    return all(bool(torch.isfinite(tensor.to(DTYPES[dtype])).all()) for tensor in stored_tensors(model).values())


@torch.no_grad()
def round_to(model: PreTrainedModel, dtype: str) -> bool:
    """Round what is saved of a model to the nearest values of a data type, in place; its own data type stays.

    Args:
        model: The model.
        dtype: A name in `DTYPES`.

    Returns:
        True if a value changed.
    """
    changed = False
    for tensor in stored_tensors(model).values():
        rounded = tensor.to(DTYPES[dtype]).to(tensor.dtype)
        if bool((rounded != tensor).any()):
            tensor.copy_(rounded)
            changed = True
    return changed


def store_as(directory: Path, dtype: str) -> None:
    """Convert the floats of a written checkpoint or adapter to a data type, file by file.

    Args:
        directory: Directory of the safetensors, with the configuration that states the data type.
        dtype: A name in `DTYPES`.
    """
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        narrow = {
            name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        total += sum(tensor.nbytes for tensor in narrow.values())
        if any(narrow[name].dtype != tensor.dtype for name, tensor in tensors.items()):
            partial = file.with_name(f".{file.name}.partial")
            save_file(narrow, partial, metadata={"format": "pt"})
            del tensors
            os.replace(partial, file)
    config = directory / "config.json"
    if config.is_file():
        _change(config, {name: dtype for name in ("dtype", "torch_dtype")})
    for index in directory.glob("*.safetensors.index.json"):
        _change(index, {"metadata": {**json.loads(index.read_text(encoding="utf-8"))["metadata"], "total_size": total}})


def _change(file: Path, fields: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
