"""Edits of a model's activations while facts are scored, and reuse of the blocks before an edit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from dissect.models.anatomy import block_of
from dissect.models.hooks import states_of, with_states
from dissect.models.model import Model
from dissect.models.taken_apart import replaced_forward
from dissect.stress.core.distractors import Facts
from dissect.stress.core.prompts_once import Pointwise
from dissect.stress.core.scores import FactScores, score_facts

Edit = Callable[[Tensor], Tensor]
Memory = dict[tuple[tuple[int, ...], bytes], Any]
"""Output of the block before an edit, by shape and tokens of the batch."""


@contextmanager
def inputs_edited(modules: Sequence[nn.Module], edit: Edit) -> Iterator[None]:
    """Change the inputs of modules while the context is open.

    Args:
        modules: The modules.
        edit: The change.

    Yields:
        Nothing; the hooks are removed when the context is closed, also after an error.
    """

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (edit(args[0]), *args[1:])

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before).remove)
        yield


@contextmanager
def outputs_edited(edits: Mapping[nn.Module, Edit], *, pointwise: bool = False) -> Iterator[None]:
    """Change the outputs of modules while the context is open; of a tuple, its first element.

    Args:
        edits: The change for each module.
        pointwise: Whether the edits treat every position by itself, which makes scoring faster.

    Yields:
        Nothing; the hooks are removed when the context is closed, also after an error.
    """

    def after(edit: Edit) -> Callable[..., Any]:
        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            return with_states(output, edit(states_of(output)))

        return change

    with ExitStack() as stack:
        for module, edit in edits.items():
            hook = Pointwise(after(edit)) if pointwise else after(edit)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def remembering(model: Model, layer: int, memory: Memory | None) -> Iterator[None]:
    """Compute the blocks before a layer only once for every batch, and keep their output in the memory.

    This is for edits of that layer and later ones, which do not change the blocks before it.

    Args:
        model: A model in memory.
        layer: The first layer that is computed each time.
        memory: Memory shared by all runs of this model and layer, empty at first; None to compute everything.

    Yields:
        Nothing; the blocks are restored when the context is closed.
    """
    if memory is None or layer == 0:
        yield
        return
    key: tuple[tuple[int, ...], bytes] = ((), b"")

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal key
        ids: Tensor = kwargs["input_ids"]
        key = (tuple(ids.shape), ids.cpu().numpy().tobytes())

    def known(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if key in memory:
                return _copy(memory[key])
            output = forward(*args, **kwargs)
            if index == layer - 1:
                memory[key] = _copy(output)
            return output

        return run

    with ExitStack() as stack:
        stack.callback(model.hf.register_forward_pre_hook(note, with_kwargs=True).remove)
        for index in range(layer):
            block = block_of(model.hf, model.anatomy, index).whole
            stack.enter_context(replaced_forward(block, known(block.forward, index)))
        yield


def _copy(output: Any) -> Any:
    """Return a copy of a block's output, because the next block may write into it."""
    return with_states(output, states_of(output).clone())


def remembered_scores(model: Model, facts: Facts, layer: int, *, batch_size: int) -> tuple[FactScores, Memory | None]:
    """Score a model without attack, and return the memory of the blocks before a layer.

    Args:
        model: A model in memory.
        facts: Facts with their distractors.
        layer: The first layer that is computed each time.
        batch_size: Maximum number of texts in one batch; no number depends on it.

    Returns:
        The scores; and the memory, or None if scores with it differ (a model whose blocks pass on more than the
        residual stream).
    """
    memory: Memory = {}
    with remembering(model, layer, memory):
        plain = score_facts(model, facts, batch_size=batch_size)
    if layer == 0:
        return plain, None
    with remembering(model, layer, memory):
        again = score_facts(model, facts, batch_size=batch_size)
    return plain, memory if np.allclose(plain.logprob, again.logprob, rtol=1e-4, atol=1e-4) else None
