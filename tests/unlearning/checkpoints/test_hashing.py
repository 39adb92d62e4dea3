"""Content hashes: against a slow computation, whatever the pieces, and never of values that are not finite."""

import hashlib

import pytest
import torch
from torch import Tensor

from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.hashing import combined_hash, content_hash, finite_hash, tensor_hash
from unlearning.common.errors import InputError


def plain_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T,
        torch.randn(2**18 + 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.linspace(0, 1, 9, dtype=torch.float64).half(),
        torch.linspace(0, 1, 9, dtype=torch.float64),
        torch.tensor(3.0, requires_grad=True),
        torch.empty(0, 3),
    ],
    ids=["float32", "transposed", "long bfloat16", "float16", "float64", "scalar", "empty"],
)
def test_tensor_hash_is_of_the_float32_bytes(tensor: Tensor) -> None:
    assert tensor_hash(tensor) == plain_hash(tensor)


def test_tensor_hash_does_not_depend_on_the_pieces() -> None:
    tensor = torch.arange(100.0)
    assert finite_hash(tensor.split(7), key="x", name="m") == plain_hash(tensor)


def test_content_hash_is_over_sorted_names_shapes_and_hashes() -> None:
    model = build_tiny_llama()
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}{plain_hash(tensor)}\n".encode())
    assert content_hash(model, name="model") == digest.hexdigest()


def test_combined_hash_tells_names_shapes_and_values_apart_and_not_the_order() -> None:
    one, two = ("a", (2, 3), "0" * 64), ("b", (6,), "1" * 64)
    assert combined_hash([one, two]) == combined_hash([two, one])
    others = [[one], [("a", (3, 2), "0" * 64), two], [("c", *one[1:]), two], [("a", (2, 3), "1" * 64), two]]
    assert len({combined_hash([one, two]), *(combined_hash(other) for other in others)}) == 5


def test_finite_values_whose_sum_is_infinite_are_not_refused() -> None:
    huge = torch.full((1000,), 3e38)
    assert torch.isinf(huge.sum())
    assert finite_hash([huge], key="x", name="m") == plain_hash(huge)


def test_values_that_are_not_finite_are_counted_over_all_pieces() -> None:
    tensor = torch.zeros(100)
    tensor[3], tensor[50], tensor[99] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(InputError) as refused:
        finite_hash(tensor.split(40), key="model.norm.weight", name="./npo")
    assert str(refused.value) == "./npo: 3 of 100 values of the tensor model.norm.weight are NaN or infinite"
