"""Content hashes of weights: the same numbers give the same hash, whatever files and dtype they are stored in."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.checkpoints.locate import ADAPTER_CONFIG, WEIGHTS, adapter_chain, is_adapter, read_json, weight_files
from unlearning.common.errors import InputError


def content_hash(model: PreTrainedModel, *, name: str) -> str:
    """Hash the weights of a model: SHA-256 over the name, shape and `tensor_hash` of every tensor.

    The same weights give the same hash from one file or many shards, in any dtype that holds them, and if they are
    never in memory together.

    Args:
        model: The model; all of its state dictionary is hashed.
        name: Name of the model, for messages.

    Returns:
        The hash in hexadecimal.

    Raises:
        InputError: A tensor holds a value that is NaN or infinite (the message names the tensor).
    """
    tensors = model.state_dict()
    hashes = {key: finite_hash(_pieces(tensor), key=key, name=name) for key, tensor in tensors.items()}
    return combined_hash((key, tensor.shape, hashes[key]) for key, tensor in tensors.items())


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values in row-major order as float32 bytes."""
    return _hash_pieces(_pieces(tensor))[0]


def finite_hash(pieces: Iterable[Tensor], *, key: str, name: str) -> str:
    """Compute the `tensor_hash` of a tensor from its values piece by piece, and check that all are finite.

    Args:
        pieces: The values in row-major order, in pieces of any size.
        key: Name of the tensor, for messages.
        name: Name of the model, for messages.

    Returns:
        The hash in hexadecimal.

    Raises:
        InputError: A value is NaN or infinite.
    """
    sha256, n_values, n_bad = _hash_pieces(pieces)
    if n_bad:
        raise InputError(f"{name}: {n_bad} of {n_values} values of the tensor {key} are NaN or infinite")
    return sha256


def combined_hash(tensors: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """Return the SHA-256 over the name, shape and `tensor_hash` of tensors, sorted by name."""
    digest = hashlib.sha256()
    for key, shape, sha256 in sorted((key, tuple(shape), sha256) for key, shape, sha256 in tensors):
        digest.update(f"{key}{shape}{sha256}\n".encode())
    return digest.hexdigest()


def configuration_hash(model: PreTrainedModel) -> str:
    """Hash all of a model's configuration that its numbers depend on besides the weights, such as the rotary base.

    Args:
        model: The model.

    Returns:
        SHA-256 in hexadecimal; names, versions and dtypes are left out.
    """
    return _json_hash(model.config.to_dict())


def stored_hash(path: Path) -> str:
    """Hash a checkpoint from its files, without loading it: weight files and configuration, an adapter's base too.

    Args:
        path: Directory of the checkpoint or of an adapter.

    Returns:
        SHA-256 in hexadecimal. A copy has the same; the same weights in other files have another one.

    Raises:
        InputError: A file is missing.
    """
    digest = hashlib.sha256()
    for part in adapter_chain(path):
        adapter = is_adapter(part)
        configuration = json.loads((part / ADAPTER_CONFIG).read_bytes()) if adapter else read_json(part)
        digest.update(_json_hash(configuration).encode())
        for file in [part / WEIGHTS] if adapter else weight_files(part):
            digest.update(file_hash(file).encode())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


_NAMES = {
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Entries of a configuration on which no number depends, or which the weights state better."""


def _json_hash(configuration: Any) -> str:
    text = json.dumps(_without_names(configuration), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _without_names(part) for key, part in value.items() if key not in _NAMES}


HASHED_AT_ONCE = 2**18
"""Number of values that are converted to float32 and hashed together: 1 MiB, which fits into a core's cache."""


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().flatten().split(HASHED_AT_ONCE)


def _hash_pieces(pieces: Iterable[Tensor]) -> tuple[str, int, int]:
    """Return the hash, the number of values, and the number of values that are NaN or infinite."""
    digest, n_values, n_bad = hashlib.sha256(), 0, 0
    for piece in pieces:
        values = piece.to("cpu", torch.float32)
        n_values += values.numel()
        if not torch.isfinite(values.sum()):  # large finite values overflow too, so the values are looked at
            n_bad += int((~torch.isfinite(values)).sum())
        digest.update(values.numpy().data)
    return digest.hexdigest(), n_values, n_bad
