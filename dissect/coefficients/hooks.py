"""Read and replace MLP coefficients during a model's own forward pass.

The coefficients of a layer are the input of its down projection; see `dissect.models.anatomy`. Every function removes
its hooks, also if the forward pass fails.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, check_in_memory
from dissect.scoring.forward import scored_logits
from unlearning.common.errors import InputError

Edit = Callable[[int, Tensor], Tensor | None]
"""Function of a layer and its coefficients [batch, position, d_mlp] that returns new ones, or None for no change."""


def check_coefficients(*models: Model) -> None:
    """Check that the MLP coefficients of these models can be read and replaced.

    Raises:
        InputError: A model is a mixture of experts, whose experts have their own down projections, or is streamed.
    """
    for model in models:
        if model.anatomy.down_proj is None:
            reason = model.weights.refused.get("mlp_coef", "its blocks have no down projection")
            raise InputError(f"{model.name} has no MLP coefficients: {reason}; or use a model with dense MLPs")
        check_in_memory(model, "reading MLP coefficients")


def down_projections(model: Model) -> list[nn.Module]:
    """Return the down projection of every layer."""
    found = [block_of(model.hf, model.anatomy, layer).down_proj for layer in range(model.n_layers)]
    return [module for module in found if module is not None]


def scored_coefficients(model: Model, batch: Batch) -> Float[Tensor, "layer scored d_mlp"]:
    """Read the coefficients at the scored positions.

    Args:
        model: The model.
        batch: Prompts that the model reads.

    Returns:
        Coefficients in float32 (float64 for a float64 model), on the model's device.
    """
    batch = batch.to(model.device)
    kept: dict[int, Tensor] = {}

    def keep(layer: int, coefficients: Tensor) -> None:
        kept[layer] = _wide(_scored(coefficients, batch))

    edited_logits(model, batch, keep)
    return torch.stack([kept[layer].to(model.device) for layer in range(model.n_layers)])


def coefficients_everywhere(
    model: Model, batch: Batch, layers: Sequence[int]
) -> tuple[Float[Tensor, "scored vocab"], dict[int, Float[Tensor, "batch position d_mlp"]]]:
    """Read the coefficients of some layers at every token position.

    Args:
        model: The model.
        batch: Prompts that the model reads.
        layers: Layers to read.

    Returns:
        The logits at the scored positions, and the coefficients by layer.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int, coefficients: Tensor) -> None:
        kept[layer] = coefficients.clone()

    return edited_logits(model, batch, keep, layers), kept


@torch.inference_mode()
def edited_logits(
    model: Model, batch: Batch, edit: Edit | None = None, layers: Sequence[int] | None = None
) -> Float[Tensor, "scored vocab"]:
    """Run a model with edited MLP coefficients.

    Args:
        model: The model.
        batch: Prompts that the model reads.
        edit: Edit of a layer's coefficients; None for a run without edits.
        layers: Layers with the edit; None for all.

    Returns:
        Logits at the scored positions, in float32 (float64 for a float64 model).
    """
    with ExitStack() as stack:
        if edit is not None:
            down = down_projections(model)
            for layer in range(model.n_layers) if layers is None else layers:
                stack.enter_context(_edited(down[layer], layer, edit, batch.input_ids.shape))
        return scored_logits(model, batch, only_scored=True)


@contextmanager
def _edited(module: nn.Module, layer: int, edit: Edit, shape: torch.Size) -> Iterator[None]:
    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        coefficients = args[0]
        edited = edit(layer, coefficients.view(*shape, -1))  # some models join batch and position in one dimension
        return None if edited is None else (edited.view_as(coefficients), *args[1:])

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _scored(states: Tensor, batch: Batch) -> Tensor:
    return states[batch.rows.to(states.device), batch.columns.to(states.device)]  # layers may be on several devices


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
