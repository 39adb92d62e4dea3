"""A model in training without dropout, for losses that compare the model with its start.

The reference quantities are computed without dropout. A model with dropout differs from its own start before the first
step: NPO's first loss on GPT-2 is then 3.2 instead of 2 ln 2 = 1.39 (beta = 1), and a KL divergence that should be 0 is
not. The same dropout mask in both would be another way; it would have to be drawn for constants that are computed once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model and all its modules into eval mode, and keep its gradient checkpointing.

    Blocks recompute their activations only in training mode. Such a block stays in it from outside, and is in eval mode
    while it computes, which also switches off the dropout that it applies itself.

    Args:
        model: A Hugging Face model, wrapped or not. Parameters keep their gradients.

    Yields:
        Nothing; afterwards every module has its own mode again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    functions: dict[GradientCheckpointingLayer, Any] = {}
    for module in modes:
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            functions[module] = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = _quiet(module, functions[module])  # type: ignore[assignment]
            module.training = True
    try:
        yield
    finally:
        for block, function in functions.items():
            block._gradient_checkpointing_func = function
        for module, mode in modes.items():
            module.training = mode


def _quiet(block: GradientCheckpointingLayer, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return the checkpointing function with the block in eval mode while it computes, also when it recomputes."""

    def quiet(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        def computed(*args: Any, **kwargs: Any) -> Any:
            block.training = False
            try:
                return forward(*args, **kwargs)
            finally:
                block.training = True

        return checkpoint(computed, *inputs, **options)

    return quiet
