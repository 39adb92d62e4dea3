"""A model's own forward with a hook on the MLP coefficients: to read them, and to put others in their place.

The coefficients of a layer are the input of its down projection; see `dissect.models.anatomy`. Hooks live only inside
the functions here, whatever happens in the forward.
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
"""A layer and its coefficients [batch, position, d_mlp]: what stands in their place, None for themselves."""


def check_coefficients(*models: Model) -> None:
    """Check that these models have coefficients that can be read and replaced.

    Raises:
        InputError: one is a mixture of experts, whose experts have down projections of their own, or is streamed.
    """
    for model in models:
        if model.anatomy.down_proj is None:
            raise InputError(
                f"{model.name} has no MLP coefficients: {type(model.hf).__name__} has no single down projection in "
                "its blocks (a mixture of experts?); choose a model with dense MLPs"
            )
        check_in_memory(model, "reading MLP coefficients")


def down_projections(model: Model) -> list[nn.Module]:
    """The down projection of every layer."""
    found = [block_of(model.hf, model.anatomy, layer).down_proj for layer in range(model.n_layers)]
    return [module for module in found if module is not None]


def scored_coefficients(model: Model, batch: Batch) -> Float[Tensor, "layer scored d_mlp"]:
    """The coefficients at the batch's scored positions, in float32 or wider."""
    batch = batch.to(model.device)
    kept: dict[int, Tensor] = {}

    def keep(layer: int, coefficients: Tensor) -> None:
        kept[layer] = _wide(_scored(coefficients, batch))

    edited_logits(model, batch, keep)
    return torch.stack([kept[layer].to(model.device) for layer in range(model.n_layers)])


def coefficients_everywhere(
    model: Model, batch: Batch, layers: Sequence[int]
) -> tuple[Float[Tensor, "scored vocab"], dict[int, Float[Tensor, "batch position d_mlp"]]]:
    """The logits at the scored positions, and these layers' coefficients at every token position."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, coefficients: Tensor) -> None:
        kept[layer] = coefficients.clone()

    return edited_logits(model, batch, keep, layers), kept


@torch.inference_mode()
def edited_logits(
    model: Model, batch: Batch, edit: Edit | None = None, layers: Sequence[int] | None = None
) -> Float[Tensor, "scored vocab"]:
    """The logits at the batch's scored positions, in float32 or wider, with an edit on these layers' coefficients.

    Args:
        model: which is run as its authors wrote it.
        batch: what it reads.
        edit: see `Edit`; None for a plain run.
        layers: where it is called; all layers by default.
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
        edited = edit(layer, coefficients.view(*shape, -1))  # some models flatten batch and position
        return None if edited is None else (edited.view_as(coefficients), *args[1:])

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _scored(states: Tensor, batch: Batch) -> Tensor:
    return states[batch.rows.to(states.device), batch.columns.to(states.device)]  # layers may lie on several devices


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
