"""Headers of weight files: data type and shape of every tensor, without its values."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from unlearning.common.errors import InputError


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor.

    Attributes:
        dtype: Data type as safetensors names it, such as `BF16`.
        shape: Shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_headers(file: Path) -> dict[str, Header]:
    """Return the header of every tensor of a file.

    Args:
        file: A safetensors file, or a pickled one, which the caller allowed.

    Returns:
        Headers by name on disk.

    Raises:
        InputError: A pickled file is broken, or holds something else than tensors by name.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pickle protocol")  # of pickles that the user allowed
            pickled = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # a broken archive or pickle raises anything
        raise InputError(f"{file}: its pickled weights are broken or hold more than tensors; copy them again") from None
    if not isinstance(pickled, dict) or not all(isinstance(tensor, Tensor) for tensor in pickled.values()):
        raise InputError(f"{file}: holds something else than tensors by name; save the model's state_dict there")
    return {
        name: Header(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in pickled.items()
    }


_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
