"""Run the whole forward pass of a model whose weights stay on disk, with one layer in memory at a time."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from dissect.models.layer_reader import LayerReader
from dissect.models.streamed_model import StreamedModel
from dissect.runtime.memory import is_out_of_memory
from unlearning.common.errors import InputError

_INSTEAD = "turn `stream` off to load it completely"


@contextmanager
def weights_on_demand(model: StreamedModel, *, blocks: str, act: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let calls of a streamed model's own forward read the weights of each stage when it is due.

    Args:
        model: The model; its parameters are on the meta device before and after.
        blocks: Dotted path of its list of blocks.
        act: Called in each stage (what stands before the blocks, every block, what stands behind them) when its
            parameters are in memory and before they are used. It may write into them: each call reads them again.

    Yields:
        Nothing; the model's forward can be called while the context is open.

    Raises:
        InputError: The model does not run its blocks once from end to end, or uses weights of another stage.
    """
    stages = _Stages(LayerReader([model], blocks=blocks), act)
    layers = list(model.hf.get_submodule(blocks).children())
    with ExitStack() as hooks:
        hooks.callback(stages.close)
        for handle in (
            model.hf.register_forward_pre_hook(lambda *_: stages.before()),
            *(
                block.register_forward_pre_hook(lambda *_, layer=layer: stages.block(layer))
                for layer, block in enumerate(layers)
            ),
            layers[-1].register_forward_hook(lambda *_: stages.after()),
            model.hf.register_forward_hook(lambda *_: stages.close()),
        ):
            hooks.callback(handle.remove)
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(f"{model.name}: cannot be streamed: {reason}; {_INSTEAD}") from None


class _Stages:
    """The stages of a forward pass; at most one is in memory."""

    def __init__(self, reader: LayerReader, act: Callable[[], None]) -> None:
        self._reader, self._act = reader, act
        self._open = ExitStack()
        self._layers: Generator[int] | None = None

    def before(self) -> None:
        self.close()
        self._enter(self._reader.embedding())

    def block(self, layer: int) -> None:
        if layer == 0:
            self.close()
            self._layers = self._open.enter_context(closing(self._reader.blocks()))
        if self._layers is None or next(self._layers, None) != layer:
            raise InputError(f"the model does not run its blocks once from end to end; {_INSTEAD}")
        self._act()

    def after(self) -> None:
        self.close()
        self._enter(self._reader.head())

    def close(self) -> None:
        self._layers = None
        self._open.close()

    def _enter(self, stage: Any) -> None:
        self._open.enter_context(stage)
        self._act()
