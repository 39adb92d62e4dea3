"""Content hashes of weights: the same numbers give the same hash, whatever files and dtype they are stored in."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
