"""Read models whose weights stay on disk, one layer of each at a time.

A streamed model is its Hugging Face module tree with parameters without values (on torch's meta device), and a map from
each parameter to a tensor in the checkpoint's files. A `LayerReader` goes through the layers of one or more such models
together: it loads the weights of one layer of every model, reads the next layer's meanwhile in a thread, and removes
them again. Tensors that the models share bit for bit are read and kept once.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dissect.models.streamed_model import StreamedModel

_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)

_KeyFilter = Callable[[StreamedModel, str], bool]
"""True if a key of a model's state dict belongs to a stage of the pass."""


@dataclass(frozen=True, eq=False)
class _Read:
    """One tensor on disk and all parameters that get its values.

    Attributes:
        model: Model from whose files the tensor is read.
        key: Key of the tensor in that model's state dict.
        destinations: All models and keys that get the values, including `model` and `key`.
    """

    model: StreamedModel
    key: str
    destinations: tuple[tuple[StreamedModel, str], ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.model.tensor(self.key).n_bytes

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the tensor in the dtype of the computation."""
        return self.model.tensor(self.key).n_values * self.model.dtype(self.key).itemsize

    @property
    def is_converted(self) -> bool:
        """True if loading copies the tensor, so that both copies are in memory for a moment."""
        same = self.model.tensor(self.key).dtype == self.model.dtype(self.key)
        return not same or self.model.device.type != "cpu"

    def read(self) -> Tensor:
        """Read the values from disk as they are stored."""
        return self.model.files.read(self.model.stored[self.key])

    def load(self, values: Tensor) -> None:
        """Convert the values and put the same object into all destinations."""
        values = values.to(self.model.device, self.model.dtype(self.key))
        if self.model.is_parameter(self.key):
            values = nn.Parameter(values, requires_grad=False)
        for model, key in self.destinations:
            model.put(key, values)

    def unload(self) -> None:
        """Put the meta tensors back into all destinations."""
        for model, key in self.destinations:
            model.unload(key)


class LayerReader:
    """Reader of the layers of one or more streamed models, with one layer of each in memory.

    A pass is `embedding()`, then `blocks()`, then `head()`. Each of them puts weights into the models' own modules and
    removes them at the end, also after an error. Tensors that are bitwise equal in several models are read once, and
    all of these models get the same `Parameter` object. At most two layers are in memory: the current one, in the dtype
    of the computation, and the next one, as it is stored. A thread reads ahead by one layer.

    Attributes:
        n_layers: Number of blocks of each model.
    """

    def __init__(self, models: Sequence[StreamedModel], *, blocks: str) -> None:
        """Plan which tensors are read in which stage.

        Args:
            models: Models of equal depth; a model may occur more than once.
            blocks: Dotted path of the list of blocks in each model, such as `model.layers`.

        Raises:
            ValueError: The models differ in depth.
        """
        self._models = list(dict.fromkeys(models))
        lengths = {len(model.hf.get_submodule(blocks)) for model in self._models}  # type: ignore[arg-type]
        if len(lengths) != 1:
            raise ValueError(f"models of different depth cannot be read together: {sorted(lengths)}")
        self.n_layers = lengths.pop()
        self._bytes_at_start = self._bytes_of_models()

        inputs = {model: _stored_in(model, model.hf.get_input_embeddings()) for model in self._models}
        heads = {model: _stored_in(model, model.hf.get_output_embeddings()) for model in self._models}

        def outside(*, without: dict[StreamedModel, set[str]], unless_in: dict[StreamedModel, set[str]]) -> _KeyFilter:
            def chosen(model: StreamedModel, key: str) -> bool:
                name = model.stored[key]
                return not key.startswith(f"{blocks}.") and (name not in without[model] or name in unless_in[model])

            return chosen

        def block(layer: int) -> _KeyFilter:
            return lambda _model, key: key.startswith(f"{blocks}.{layer}.")

        self._before_blocks = _plan_reads(self._models, outside(without=heads, unless_in=inputs))
        self._blocks = [_plan_reads(self._models, block(layer)) for layer in range(self.n_layers)]
        self._after_blocks = _plan_reads(self._models, outside(without=inputs, unless_in=heads))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from disk since this reader was made."""
        return self._bytes_of_models() - self._bytes_at_start

    def min_weight_bytes(self) -> int:
        """Return the smallest number of bytes that the weights of a pass take, on host and device together.

        This is the maximum over the embedding, the head, and every layer together with the next one as it is stored.

        Returns:
            The number of bytes.
        """
        stages = (self._before_blocks, *self._blocks, self._after_blocks)
        widest = [
            sum(read.loaded_bytes for read in reads)
            + max((read.stored_bytes for read in reads if read.is_converted), default=0)
            for reads in stages
        ]
        ahead = [
            sum(read.loaded_bytes for read in here) + sum(read.stored_bytes for read in following)
            for here, following in zip(self._blocks, self._blocks[1:], strict=False)
        ]
        return max(*widest, *ahead)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Load everything outside the blocks except the output head: what is needed before the first block.

        Yields:
            Nothing; the weights are in memory while the context is open.

        Raises:
            InputError: A file cannot be read, or was truncated in the meantime.
        """
        with _loaded(self._before_blocks, _Read.read):
            yield

    def blocks(self) -> Generator[int]:
        """Go through the layers.

        Yields:
            The index of each layer; the weights of its block are in memory in every model until the next is requested.

        Raises:
            InputError: A file cannot be read, or was truncated in the meantime; raised when the layer is due.
        """
        stopped = threading.Event()

        def read_layer(layer: int) -> dict[_Read, Tensor]:
            held = {}
            for read in self._blocks[layer]:
                if stopped.is_set():
                    break
                held[read] = read.read()
            return held

        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as thread:
            try:
                ahead = thread.submit(read_layer, 0)
                for layer, reads in enumerate(self._blocks):
                    # Converted here, one tensor at a time, and not in the thread: stored values are often half as wide.
                    with _loaded(reads, ahead.result().pop):
                        if layer + 1 < self.n_layers:
                            ahead = thread.submit(read_layer, layer + 1)
                        yield layer
            finally:
                stopped.set()  # leaving the pool waits for the thread, which then reads at most one more tensor

    @contextmanager
    def head(self) -> Iterator[None]:
        """Load everything outside the blocks except the input embeddings; tied embeddings are loaded for the head.

        Yields:
            Nothing; the weights are in memory while the context is open.

        Raises:
            InputError: A file cannot be read, or was truncated in the meantime.
        """
        with _loaded(self._after_blocks, _Read.read):
            yield

    def _bytes_of_models(self) -> int:
        return sum(model.files.bytes_read for model in self._models)


def _stored_in(model: StreamedModel, module: nn.Module | None) -> set[str]:
    """Return the names on disk of a module's tensors."""
    prefixes = tuple(f"{name}." for name, found in model.hf.named_modules() if found is module and name)
    return {name for key, name in model.stored.items() if prefixes and key.startswith(prefixes)}


def _plan_reads(models: Sequence[StreamedModel], chosen: _KeyFilter) -> list[_Read]:
    """Return one read for all keys with the same values: tied in one model, or equal bit for bit in several."""
    destinations: dict[tuple[object, ...], list[tuple[StreamedModel, str]]] = {}
    tied_to: dict[tuple[StreamedModel, str], str] = {}
    for model in models:
        for key, name in model.stored.items():
            if not chosen(model, key):
                continue
            tensor = model.tensor(key)
            # Hashes are of float32 values, so they cannot show that values of a wider dtype are equal.
            values = model.hashes[key] if tensor.dtype in _EXACT_IN_FLOAT32 else model
            first = tied_to.setdefault((model, name), key)
            same = (first, tensor.shape, values, model.dtype(key), model.device, model.is_parameter(key))
            destinations.setdefault(same, []).append((model, key))
    return [_Read(*group[0], tuple(group)) for group in destinations.values()]


@contextmanager
def _loaded(reads: Sequence[_Read], values_of: Callable[[_Read], Tensor]) -> Iterator[None]:
    """Load the values of reads, and put the meta tensors back at the end, also after an error."""
    try:
        for read in reads:
            read.load(values_of(read))
        yield
    finally:
        for read in reads:
            read.unload()
