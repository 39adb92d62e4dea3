"""Single tensors of a checkpoint's safetensors files, read from disk one by one."""

import json
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import torch
from torch import Tensor

from unlearning.checkpoints.locate import INDEX, SINGLE, check_files, weight_files
from unlearning.common.errors import InputError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""torch's dtype of each data type that a language model's safetensors file may hold."""


@dataclass(frozen=True)
class StoredTensor:
    """Position of a tensor on disk.

    Attributes:
        file: The file that holds the tensor.
        offset: Its first byte, counted from the beginning of the file.
        shape: Its shape.
        dtype: Dtype of its values on disk.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size on disk in bytes."""
        return self.n_values * self.dtype.itemsize


class TensorFiles:
    """The weights of a checkpoint directory, in one file or in shards with an index.

    Opening reads the headers only; each read copies a tensor's bytes into a fresh buffer. The files are not mapped
    into memory: a mapped file that is cut short or vanishes kills the process (SIGBUS) instead of raising, and its
    pages count as resident memory. Several threads may read at once.

    Attributes:
        path: The checkpoint's directory.
        files: Its weight files.
        tensors: Every tensor by its name on disk.
        bytes_read: Bytes of tensors read since the checkpoint was opened.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Args:
            path: Directory of the checkpoint.

        Raises:
            InputError: A file is missing, broken or cut short, or a shard lacks a tensor that the index places there.
        """
        check_files(path)
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        self.files = weight_files(path)
        index = path / INDEX
        sharded = self.files != [path / SINGLE]
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if sharded else {}
        headers = {file: _read_header(file) for file in self.files}
        for name, shard in placed.items():
            if name not in headers[path / shard]:
                raise InputError(
                    f"{path / shard}: lacks the tensor {name}, which {INDEX} places there; copy both again"
                )
        self.tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored, into memory that goes back to the system when the tensor is freed.

        Args:
            name: Name of the tensor on disk.

        Returns:
            The tensor, in its dtype on disk.

        Raises:
            InputError: The file cannot be read, or became shorter after it was opened.
            MemoryError: The tensor does not fit into memory.
        """
        stored = self.tensors[name]
        values = _own_memory(stored.n_values, stored.dtype)
        for _ in self._fill(name, [values]):
            pass
        return values.view(stored.shape)

    def pieces(self, name: str, n_values: int) -> Iterator[Tensor]:
        """Read the values of a tensor piece by piece, in row-major order.

        Args:
            name: Name of the tensor on disk.
            n_values: Values of a piece; the last piece may have fewer.

        Returns:
            Flat tensors, each in its own memory.

        Raises:
            InputError: The file cannot be read, or became shorter after it was opened.
        """
        stored = self.tensors[name]
        sizes = (min(n_values, stored.n_values - start) for start in range(0, stored.n_values, n_values))
        return self._fill(name, (torch.empty(size, dtype=stored.dtype) for size in sizes))

    def _fill(self, name: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Fill the parts one after the other with the tensor's values, and yield each."""
        stored = self.tensors[name]
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                for values in parts:
                    room = values.view(torch.uint8).numpy().data
                    while room:  # one call reads at most 2 GiB
                        n = file.readinto(room)
                        if not n:
                            raise InputError(f"{stored.file}: cut short within the tensor {name}; copy it again")
                        room = room[n:]
                        with self._lock:
                            self.bytes_read += n
                    yield values
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{stored.file}: cannot be read: {reason}; check the disk, or copy it again") from None


_MALLOCED = 2**16
"""Size in bytes below which memory comes from malloc."""


def _own_memory(n_values: int, dtype: torch.dtype) -> Tensor:
    """Allocate memory that goes back to the system when freed; malloc keeps some hundred MB of blocks below 32 MiB."""
    n_bytes = n_values * dtype.itemsize
    if n_bytes < _MALLOCED:
        return torch.empty(n_values, dtype=dtype)
    try:
        return torch.frombuffer(mmap(-1, n_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=dtype)
    except OSError:
        raise MemoryError(f"no room for {n_bytes} bytes") from None


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a whole file: its length in 8 bytes, little-endian, then JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: its header cannot be read ({error}); copy it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{file}: the tensor {name} has the data type {entry['dtype']}, which is not read here; "
                f"save the weights as one of {', '.join(DTYPES)}"
            )
    return {
        name: StoredTensor(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }
