"""The models of a sweep, layer by layer, wherever their weights are."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Protocol

from dissect.models.anatomy import Block, block_of
from dissect.models.model import Model


class Layers(Protocol):
    """What a walk over the layers asks of its models' weights.

    Attributes:
        models: the base first, then the targets.
    """

    models: Sequence[Model]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read from disk."""

    def embedding(self) -> AbstractContextManager[None]:
        """While open, the models can embed tokens."""

    def blocks(self) -> Generator[list[Block]]:
        """Every layer's blocks, one of each model, to be run before the next are asked for."""

    def head(self) -> AbstractContextManager[None]:
        """While open, the models can turn final states into logits."""


class InMemory:
    """Models that are in memory as a whole."""

    bytes_read = 0

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models

    def embedding(self) -> AbstractContextManager[None]:
        """Nothing has to be fetched."""
        return nullcontext()

    def blocks(self) -> Generator[list[Block]]:
        """The models' own blocks."""
        for layer in range(self.models[0].n_layers):
            yield [block_of(model.hf, model.anatomy, layer) for model in self.models]

    def head(self) -> AbstractContextManager[None]:
        """Nothing has to be fetched."""
        return nullcontext()


class Streamed:
    """Models that are on disk, one layer of each in memory at a time."""

    def __init__(self, models: Sequence[Model]) -> None:
        from dissect.engine.streaming import LayerReader

        self.models = models
        streamed = [model.streamed for model in models if model.streamed is not None]
        self._reader = LayerReader(streamed, blocks=models[0].anatomy.blocks)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read from disk."""
        return self._reader.bytes_read

    @property
    def least_memory(self) -> int:
        """Least bytes that the weights of a walk take."""
        return self._reader.least_memory()

    def embedding(self) -> AbstractContextManager[None]:
        """Everything that is needed before the blocks, read now."""
        return self._reader.embedding()

    def blocks(self) -> Generator[list[Block]]:
        """Each layer's blocks while their weights are there; the next layer's are read meanwhile."""
        with closing(self._reader.blocks()) as layers:
            for layer in layers:
                yield [block_of(model.hf, model.anatomy, layer) for model in self.models]

    def head(self) -> AbstractContextManager[None]:
        """Everything that is needed after the blocks, read now."""
        return self._reader.head()


def layers_of(models: Sequence[Model]) -> InMemory | Streamed:
    """The layers of models that are all in memory or all streamed."""
    return Streamed(models) if models[0].streamed is not None else InMemory(models)
