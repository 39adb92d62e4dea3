"""The setting of float32 products is the process's own again, whatever happened meanwhile."""

import pytest
import torch

from dissect.runtime.precision import Precision, matmul_precision


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("inside", ["highest", "high"])
def test_precision_holds_inside_and_is_put_back(inside: Precision, before: str) -> None:
    process = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with matmul_precision(inside):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(RuntimeError, match="in the middle"), matmul_precision(inside):
            raise RuntimeError("in the middle")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(process)
