"""Content hashes of weights."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from unlearning.common.errors import InputError


def content_hash(model: PreTrainedModel, *, name: str) -> str:
    """SHA-256 over the name, shape and `tensor_hash` of every tensor, whatever files they came from.

    The same weights give the same hash from one file or many shards, in any load dtype that holds them, and when
    they are never in memory together.

    Raises:
        InputError: a tensor holds a value that is not finite (which tensor).
    """
    tensors = model.state_dict()
    hashes = {key: finite_hash(_pieces(tensor), key=key, name=name) for key, tensor in tensors.items()}
    return combined_hash((key, tensor.shape, hashes[key]) for key, tensor in tensors.items())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in row-major order as float32 bytes."""
    return _hash_pieces(_pieces(tensor))[0]


def finite_hash(pieces: Iterable[Tensor], *, key: str, name: str) -> str:
    """`tensor_hash` of the tensor `key` of the model `name`, from its values piece by piece.

    Raises:
        InputError: a value is NaN or infinite.
    """
    sha256, n_values, n_bad = _hash_pieces(pieces)
    if n_bad:
        raise InputError(f"{name}: {n_bad} of {n_values} values of the tensor {key} are NaN or infinite")
    return sha256


def combined_hash(tensors: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """SHA-256 over the name, shape and `tensor_hash` of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key, shape, sha256 in sorted((key, tuple(shape), sha256) for key, shape, sha256 in tensors):
        digest.update(f"{key}{shape}{sha256}\n".encode())
    return digest.hexdigest()


HASHED_AT_ONCE = 2**18
"""Values that are widened to float32 and hashed together: 1 MiB, which a core's cache holds."""


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().flatten().split(HASHED_AT_ONCE)


def _hash_pieces(pieces: Iterable[Tensor]) -> tuple[str, int, int]:
    """The hash, the number of values, and how many of them are not finite."""
    digest, n_values, n_bad = hashlib.sha256(), 0, 0
    for piece in pieces:
        values = piece.to("cpu", torch.float32)
        n_values += values.numel()
        if not torch.isfinite(values.sum()):  # which large finite values overflow too, so they are counted
            n_bad += int((~torch.isfinite(values)).sum())
        digest.update(values.numpy().data)
    return digest.hexdigest(), n_values, n_bad
