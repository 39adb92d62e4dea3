"""Representation misdirection: a block's output on forget text is steered to a random vector, on retain text kept."""

import re
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearning.common.errors import InputError
from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.objectives import losses
from unlearning.objectives.forward import block_output, blocks, unwrapped
from unlearning.options import option

SOURCE = "RMU 2403.03218, Zephyr-7B"


@dataclass(frozen=True)
class RMUOptions:
    """Where and whereto the forget text is steered, and the weights of the two losses.

    Zephyr-7B has 32 blocks and is steered at block 7, a quarter of its depth. Alpha is the weight of a mean over
    tokens and hidden dimensions, as gamma is; of two squared norms it would be the same.
    """

    layer: int | None = option(
        None, "block that is steered, from 0 (none: the one that ends a quarter of the depth)", source=SOURCE, minimum=0
    )
    steering_coefficient: float = option(6.5, "norm of the vector that is steered to", source=SOURCE, above=0)
    steering_seed: int = option(0, "of the vector's direction", minimum=0)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(1200.0, "weight of the retain loss (0: none)", source=SOURCE, minimum=0)


def steering_vector(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """The unit vector u: uniform in [0, 1) in every direction, then normalised; the same on every device."""
    drawn = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def steered_layer(model: PreTrainedModel, layer: int | None) -> int:
    """The block that is steered, from 0.

    Raises:
        InputError: the model has no such block.
    """
    n_layers = len(blocks(model))
    if layer is None:
        return max((n_layers + 2) // 4 - 1, 0)
    if layer >= n_layers:
        raise InputError(f"there is no layer {layer}: the model has layers 0 to {n_layers - 1}")
    return layer


def with_layer(model: PreTrainedModel, options: RMUOptions) -> RMUOptions:
    """The options with the layer's number in place of none."""
    return replace(options, layer=steered_layer(model, options.layer))


def forget_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """F = mean_{t, i} (h_ti - c u_i)^2 over all tokens of the forget texts, prompts too."""
    assert batch.forget is not None
    hidden = block_output(model, batch.forget, steered_layer(model, options.layer))
    target = options.steering_coefficient * steering_vector(hidden.shape[-1], options.steering_seed)
    return losses.rmu(hidden, target.to(hidden.device), n_positions=batch.window.forget_positions)


def retain_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """R = mean_{t, i} (h_ti - h_ti^start)^2 over all tokens of the retain texts; 0 at the start."""
    assert batch.retain is not None and batch.retain.reference_hidden is not None
    hidden = block_output(model, batch.retain, steered_layer(model, options.layer))
    return losses.rmu(hidden, batch.retain.reference_hidden, n_positions=batch.window.retain_positions)


def trained_parameters(model: PreTrainedModel, options: RMUOptions) -> str:
    """The down projections' weights of the steered block and the two before it, as one regular expression.

    Raises:
        InputError: the model has no such block, or no down projection that could be found.
    """
    layer = steered_layer(model, options.layer)
    found = blocks(model)
    (prefix,) = (name for name, module in unwrapped(model).named_modules() if module is found)
    d_model = int(unwrapped(model).config.get_text_config().hidden_size)
    names = []
    for place in range(max(layer - 2, 0), layer + 1):
        inside = down_projections(found[place], d_model)
        if not inside:
            raise InputError(
                f"{type(unwrapped(model)).__name__}: the MLP's down projection could not be found in layer {place}; "
                "name the weights to train with train_parameters"
            )
        names += [f"{prefix}.{place}.{name}.weight" for name in inside]
    return "^(" + "|".join(re.escape(name) for name in names) + ")$"


def down_projections(block: nn.Module, d_model: int) -> list[str]:
    """Names, within a block, of the linear maps of the MLP that write to the residual stream.

    They are known by their shape, from another width to d_model; where the MLP is as wide as the model, the last of
    the linear maps outside of the attention is taken. Of experts that are stored as one tensor nothing is found.
    """
    if any(parameter.ndim > 2 for parameter in block.parameters()):
        return []
    into: dict[str, int] = {}
    for name, module in block.named_modules():
        if any("attn" in part or "attention" in part for part in name.lower().split(".")):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            wide_in, wide_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            if wide_out == d_model:
                into[name] = wide_in
    widening = [name for name, width in into.items() if width != d_model]
    return widening or list(into)[-1:]


RMU = Method(
    name="rmu",
    summary="gamma mean (h - c u)^2 on forget + alpha mean (h - h start)^2 on retain, h a block's output, "
    "u a random unit vector",
    source="RMU 2403.03218",
    options=RMUOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        references=(Reference("retain", "hidden", options.layer),) if options.alpha > 0 else (),
    ),
    needs_note="forget, reference and retain unless alpha=0; trains down projections of three blocks",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    trains=trained_parameters,
    resolve=with_layer,
)
