"""How much goes through a block at once: any sizes give every item once, and memory that is short halves them."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect.engine.chunk import Chunk
from dissect.runtime.memory import is_out_of_memory


def out_of_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@settings(max_examples=100, derandomize=True)
@given(n=st.integers(0, 40), tokens=st.integers(1, 300), tokens_each=st.integers(1, 50), fits=st.integers(1, 50))
def test_every_item_is_run_once_and_in_order_whatever_fits(n: int, tokens: int, tokens_each: int, fits: int) -> None:
    sizes: list[int] = []

    def run(some: Sequence[int]) -> list[int]:
        sizes.append(len(some))
        if len(some) > fits:
            raise out_of_memory()
        return list(some)

    chunk = Chunk(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = list(chunk.run(range(n), tokens_each, run))
    assert [item for result in results for item in result] == list(range(n))
    at_once = max(1, round(tokens / tokens_each))  # at most half a chunk more than one
    assert all(size <= at_once for size in sizes)
    if n and fits >= at_once:  # nothing went wrong: as few runs as there can be
        assert len(sizes) == -(-n // at_once)
        assert chunk.tokens == tokens
    assert all(2 * len(result) >= min(fits, at_once) for result in results[:-1])


def test_short_memory_halves_the_chunk_for_good_and_says_so() -> None:
    sizes: list[int] = []

    def run(some: Sequence[str]) -> int:
        sizes.append(len(some))
        if len(some) > 2:
            raise out_of_memory()
        return len(some)

    chunk = Chunk(80)
    with pytest.warns(UserWarning, match="out of memory: continuing with chunks of ") as seen:
        assert list(chunk.run("abcdefghi", 10, run)) == [2, 2, 2, 2, 1]
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    assert [str(warning.message)[-9:] for warning in seen] == ["40 tokens", "20 tokens"]
    assert chunk.tokens == 20


def test_one_item_that_does_not_fit_is_the_end() -> None:
    def run(_some: Sequence[int]) -> None:
        raise out_of_memory()

    chunk = Chunk(100)
    with pytest.warns(UserWarning, match="chunks of 10 tokens"), pytest.raises(torch.OutOfMemoryError):
        list(chunk.run(range(3), 10, run))


def test_other_errors_are_passed_on_at_once() -> None:
    calls: list[int] = []

    def run(some: Sequence[int]) -> None:
        calls.append(len(some))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(Chunk(100).run(range(3), 10, run))
    assert calls == [3]


def test_memory_of_every_device_is_recognised() -> None:
    assert is_out_of_memory(out_of_memory())
    assert is_out_of_memory(MemoryError())
    # What a CPU's allocator says: PyTorch has no class of its own for that.
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("expected scalar type Float but found Double"))


def test_the_cpu_s_own_complaint_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
