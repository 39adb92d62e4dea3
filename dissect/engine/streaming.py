"""Models whose weights stay on disk: one layer of each in memory at a time.

A streamed model is its Hugging Face module tree with parameters that hold no numbers (on torch's meta device) and a
map from each of them to a tensor in the checkpoint's files. A `LayerReader` walks one or more such models together:
it puts the weights of one layer of every model in place, reads the next layer's meanwhile in a thread, and takes them
away again. What the models have in common to the bit is read and held once.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dissect.models.streamed_model import StreamedModel, open_streamed

__all__ = ["LayerReader", "StreamedModel", "open_streamed"]

_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)

_Choice = Callable[[StreamedModel, str], bool]
"""Whether a key of a model's state dict belongs to a stage of the walk."""


@dataclass(frozen=True, eq=False)
class _Read:
    """One tensor on disk and all the places it goes to.

    Attributes:
        model: whose files it is read from.
        key: what it is in that model.
        places: models and their keys that take it, this one among them.
    """

    model: StreamedModel
    key: str
    places: tuple[tuple[StreamedModel, str], ...]

    @property
    def stored_bytes(self) -> int:
        """Its size as it is read."""
        return self.model.tensor(self.key).n_bytes

    @property
    def placed_bytes(self) -> int:
        """Its size in place."""
        return self.model.tensor(self.key).n_values * self.model.dtype(self.key).itemsize

    @property
    def is_converted(self) -> bool:
        """Whether putting it in place copies it, so that both are in memory for a moment."""
        same = self.model.tensor(self.key).dtype == self.model.dtype(self.key)
        return not same or self.model.device.type != "cpu"

    def load(self) -> Tensor:
        """Its values as they are stored."""
        return self.model.files.read(self.model.stored[self.key])

    def place(self, values: Tensor) -> None:
        """Put its values, converted, in all its places: the same object everywhere."""
        values = values.to(self.model.device, self.model.dtype(self.key))
        if self.model.is_parameter(self.key):
            values = nn.Parameter(values, requires_grad=False)
        for model, key in self.places:
            model.put(key, values)

    def put_away(self) -> None:
        """Empty all its places."""
        for model, key in self.places:
            model.put_away(key)


class LayerReader:
    """Walks the layers of one or more streamed models together, with one layer of each in place.

    A pass is `embedding()`, then `blocks()`, then `head()`. Each puts weights into the models' own modules and leaves
    none behind, however it ends. Tensors that are bitwise equal in several models are read once, and the same
    `Parameter` object stands in all of them. In memory are at most the layer in place, as it is computed, and the
    next one, as it is stored: a thread reads ahead by one layer and no further.

    Attributes:
        n_layers: number of blocks of each model.
    """

    def __init__(self, models: Sequence[StreamedModel], *, blocks: str) -> None:
        """Plan what is read when.

        Args:
            models: of equal depth; a model may stand there more than once.
            blocks: dotted path of the blocks in each, as `model.layers`.
        """
        self._models = list(dict.fromkeys(models))
        lengths = {len(model.hf.get_submodule(blocks)) for model in self._models}  # type: ignore[arg-type]
        if len(lengths) != 1:
            raise ValueError(f"models of different depth cannot be walked together: {sorted(lengths)}")
        self.n_layers = lengths.pop()
        self._before = self._bytes_of_models()

        inputs = {model: _stored_in(model, model.hf.get_input_embeddings()) for model in self._models}
        heads = {model: _stored_in(model, model.hf.get_output_embeddings()) for model in self._models}

        def outside(*, without: dict[StreamedModel, set[str]], unless_in: dict[StreamedModel, set[str]]) -> _Choice:
            def chosen(model: StreamedModel, key: str) -> bool:
                name = model.stored[key]
                return not key.startswith(f"{blocks}.") and (name not in without[model] or name in unless_in[model])

            return chosen

        def block(layer: int) -> _Choice:
            return lambda _model, key: key.startswith(f"{blocks}.{layer}.")

        self._before_blocks = _plan(self._models, outside(without=heads, unless_in=inputs))
        self._blocks = [_plan(self._models, block(layer)) for layer in range(self.n_layers)]
        self._after_blocks = _plan(self._models, outside(without=inputs, unless_in=heads))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from disk since this reader was made."""
        return self._bytes_of_models() - self._before

    def min_weight_bytes(self) -> int:
        """Least bytes that weights take in the widest moment of a pass, on host and device together.

        That is the embedding stage, a layer in place with the next one as it is stored, or the head.
        """
        stages = (self._before_blocks, *self._blocks, self._after_blocks)
        widest = [
            sum(read.placed_bytes for read in reads)
            + max((read.stored_bytes for read in reads if read.is_converted), default=0)
            for reads in stages
        ]
        ahead = [
            sum(read.placed_bytes for read in here) + sum(read.stored_bytes for read in following)
            for here, following in zip(self._blocks, self._blocks[1:], strict=False)
        ]
        return max(*widest, *ahead)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Everything outside the blocks but the output head in place: what is needed before the first block.

        Raises:
            InputError: the disk refuses, or a file was cut short meanwhile.
        """
        with _placed(self._before_blocks, _Read.load):
            yield

    def blocks(self) -> Generator[int]:
        """The layers in order, each with the weights of its block in place in every model until the next is asked for.

        Raises:
            InputError: the disk refuses, or a file was cut short meanwhile; raised when the layer's turn has come.
        """
        stopped = threading.Event()

        def read_layer(layer: int) -> dict[_Read, Tensor]:
            held = {}
            for read in self._blocks[layer]:
                if stopped.is_set():
                    break
                held[read] = read.load()
            return held

        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as thread:
            try:
                ahead = thread.submit(read_layer, 0)
                for layer, reads in enumerate(self._blocks):
                    # Converted here and not in the thread, and let go one by one: stored values are half as wide.
                    with _placed(reads, ahead.result().pop):
                        if layer + 1 < self.n_layers:
                            ahead = thread.submit(read_layer, layer + 1)
                        yield layer
            finally:
                stopped.set()  # the thread is waited for: at most one tensor more

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything outside the blocks but the input embeddings in place (also those where they are the head's).

        Raises:
            InputError: the disk refuses, or a file was cut short meanwhile.
        """
        with _placed(self._after_blocks, _Read.load):
            yield

    def _bytes_of_models(self) -> int:
        return sum(model.files.bytes_read for model in self._models)


def _stored_in(model: StreamedModel, module: nn.Module | None) -> set[str]:
    """The names on disk of a module's tensors."""
    prefixes = tuple(f"{name}." for name, found in model.hf.named_modules() if found is module and name)
    return {name for key, name in model.stored.items() if prefixes and key.startswith(prefixes)}


def _plan(models: Sequence[StreamedModel], chosen: _Choice) -> list[_Read]:
    """One read for all keys that take the same values: tied in a model, or under one name bitwise equal in several."""
    places: dict[tuple[object, ...], list[tuple[StreamedModel, str]]] = {}
    tied_to: dict[tuple[StreamedModel, str], str] = {}
    for model in models:
        for key, name in model.stored.items():
            if not chosen(model, key):
                continue
            tensor = model.tensor(key)
            # Hashes are of float32 values: they say nothing about wider ones.
            values = model.hashes[key] if tensor.dtype in _EXACT_IN_FLOAT32 else model
            first = tied_to.setdefault((model, name), key)
            same = (first, tensor.shape, values, model.dtype(key), model.device, model.is_parameter(key))
            places.setdefault(same, []).append((model, key))
    return [_Read(*group[0], tuple(group)) for group in places.values()]


@contextmanager
def _placed(reads: Sequence[_Read], values_of: Callable[[_Read], Tensor]) -> Iterator[None]:
    """The reads' values in place, and meta tensors there again afterwards, however it ends."""
    try:
        for read in reads:
            read.place(values_of(read))
        yield
    finally:
        for read in reads:
            read.put_away()
