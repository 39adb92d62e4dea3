"""Iterate over the layers of a sweep's models, whether their weights are in memory or on disk."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Protocol

from dissect.models.anatomy import Block, block_of
from dissect.models.layer_reader import LayerReader
from dissect.models.model import Model


class Layers(Protocol):
    """Access to the weights of a sweep's models, stage by stage.

    Attributes:
        models: The base, then the donor's model if it is not the base, then the targets.
    """

    models: Sequence[Model]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read from disk."""

    def embedding(self) -> AbstractContextManager[None]:
        """Return a context in which the models can embed tokens."""

    def blocks(self) -> Generator[list[Block]]:
        """Yield each layer's blocks, one of each model, valid until the next layer is requested."""

    def head(self) -> AbstractContextManager[None]:
        """Return a context in which the models can compute logits from final hidden states."""


class InMemory:
    """Layers of models that are completely in memory."""

    bytes_read = 0

    def __init__(self, models: Sequence[Model]) -> None:
        """Keep the models, in the order of `Layers.models`."""
        self.models = models

    def embedding(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def blocks(self) -> Generator[list[Block]]:
        """Yield each layer's blocks, one of each model."""
        for layer in range(self.models[0].n_layers):
            yield [block_of(model.hf, model.anatomy, layer) for model in self.models]

    def head(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()


class Streamed:
    """Layers of models that are on disk; one layer of each model is in memory at a time."""

    def __init__(self, models: Sequence[Model]) -> None:
        """Plan what is read; the models are in the order of `Layers.models`."""
        self.models = models
        streamed = [model.streamed for model in models if model.streamed is not None]
        self._reader = LayerReader(streamed, blocks=models[0].anatomy.blocks)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read from disk."""
        return self._reader.bytes_read

    @property
    def min_weight_bytes(self) -> int:
        """Smallest number of bytes that the weights of a pass take."""
        return self._reader.min_weight_bytes()

    def embedding(self) -> AbstractContextManager[None]:
        """Return a context in which everything needed before the blocks is in memory."""
        return self._reader.embedding()

    def blocks(self) -> Generator[list[Block]]:
        """Yield each layer's blocks while their weights are in memory; the next layer's are read meanwhile."""
        with closing(self._reader.blocks()) as layers:
            for layer in layers:
                yield [block_of(model.hf, model.anatomy, layer) for model in self.models]

    def head(self) -> AbstractContextManager[None]:
        """Return a context in which everything needed after the blocks is in memory."""
        return self._reader.head()


def layers_of(models: Sequence[Model]) -> InMemory | Streamed:
    """Return the layers of models that are all in memory or all streamed."""
    return Streamed(models) if models[0].streamed is not None else InMemory(models)
