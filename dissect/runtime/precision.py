"""Set the precision of float32 matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["highest", "high"]
"""`highest` is float32; `high` allows a GPU to use TF32, whose products have 11 bits of mantissa instead of 24."""


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 matrices at a precision, and put the process's own setting back at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
