"""How exactly float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["highest", "high"]
"""`highest` is float32; `high` lets a GPU use TF32, whose products have 11 bits of mantissa instead of 24."""


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 matrices so, whatever the process had set; its setting is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
