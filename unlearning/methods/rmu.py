"""RMU (representation misdirection): steer a block's output to a random vector on forget text, keep it on retain text.

Loss: J = gamma F + alpha R, F = mean_{t, i} (h_ti - c u_i)^2 >= 0 over all tokens of the forget texts (u a random unit
vector), R = mean_{t, i} (h_ti - h_ti^ref)^2 >= 0 over all tokens of the retain texts; h is the block's output.
Needs: forget data; retain data and hidden states of the reference model unless alpha = 0. Trains the down projections
of the block and of the two before it.
Source: The WMDP Benchmark (RMU), arXiv 2403.03218, normalised as in its code.
"""

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
    """Options of RMU.

    The paper steers Zephyr-7B, which has 32 blocks, at block 7, a quarter of the depth. Both losses are means over
    tokens and hidden dimensions; with squared norms instead, alpha would be the same.
    """

    layer: int | None = option(
        None, "block that is steered, from 0 (none: at a quarter of the depth)", source=SOURCE, minimum=0
    )
    steering_coefficient: float = option(6.5, "norm c of the target vector", source=SOURCE, above=0)
    steering_seed: int = option(0, "seed of the direction of the target vector", minimum=0)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(1200.0, "weight of the retain loss (0: none)", source=SOURCE, minimum=0)


def steering_vector(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """Draw the unit vector u: uniform in [0, 1) in each dimension, then normalised.

    Args:
        d_model: Hidden size.
        seed: Seed of the draw, which is made on the CPU so that u is the same on every device.

    Returns:
        Float32, on the CPU.
    """
    drawn = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def steered_layer(model: PreTrainedModel, layer: int | None) -> int:
    """Return the index of the block that is steered.

    Args:
        model: The model.
        layer: Index of a block, from 0; None chooses the last block of the first quarter of the depth.

    Returns:
        The index of the block.

    Raises:
        InputError: The model has no such block.
    """
    n_layers = len(blocks(model))
    if layer is None:
        return max((n_layers + 2) // 4 - 1, 0)
    if layer >= n_layers:
        raise InputError(f"`layer` must be between 0 and {n_layers - 1} for this model, got {layer}")
    return layer


def with_layer(model: PreTrainedModel, options: RMUOptions) -> RMUOptions:
    """Return the options with `layer` filled in."""
    return replace(options, layer=steered_layer(model, options.layer))


def forget_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """Compute F = mean_{t, i} (h_ti - c u_i)^2 >= 0 over all tokens of the forget texts, prompts included."""
    assert batch.forget is not None
    hidden = block_output(model, batch.forget, steered_layer(model, options.layer))
    target = options.steering_coefficient * steering_vector(hidden.shape[-1], options.steering_seed)
    return losses.rmu(hidden, target.to(hidden.device), n_positions=batch.step_batch.forget_positions)


def retain_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """Compute R = mean_{t, i} (h_ti - h_ti^ref)^2 >= 0 over all tokens of the retain texts; 0 before training."""
    assert batch.retain is not None and batch.retain.reference_hidden is not None
    hidden = block_output(model, batch.retain, steered_layer(model, options.layer))
    return losses.rmu(hidden, batch.retain.reference_hidden, n_positions=batch.step_batch.retain_positions)


def trained_parameters(model: PreTrainedModel, options: RMUOptions) -> str:
    """Return a pattern of the down projections of the steered block and of the two blocks before it.

    Args:
        model: The model.
        options: RMU's options.

    Returns:
        A regular expression of parameter names.

    Raises:
        InputError: The model has no such block, or its down projections were not found.
    """
    layer = steered_layer(model, options.layer)
    found = blocks(model)
    (prefix,) = (name for name, module in unwrapped(model).named_modules() if module is found)
    d_model = int(unwrapped(model).config.get_text_config().hidden_size)
    names = []
    for index in range(max(layer - 2, 0), layer + 1):
        inside = down_projections(found[index], d_model)
        if not inside:
            raise InputError(
                f"the MLP's down projection was not found in layer {index} of {type(unwrapped(model)).__name__}. "
                "Set `train_parameters` to a regular expression of the weights to train."
            )
        names += [f"{prefix}.{index}.{name}.weight" for name in inside]
    return "^(" + "|".join(re.escape(name) for name in names) + ")$"


def down_projections(block: nn.Module, d_model: int) -> list[str]:
    """Find the linear maps of a block's MLP that write to the residual stream.

    They are recognised by their shape, from another width to d_model. If the MLP is as wide as the model, the last
    linear map outside the attention is taken. Experts that are stored as one tensor are not found.

    Args:
        block: A transformer block.
        d_model: Hidden size.

    Returns:
        Module names within the block; empty if none was found.
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
    summary="gamma mean (h - c u)^2 on forget + alpha mean (h - h_ref)^2 on retain, h a block's output, "
    "u a random unit vector; trains the down projections of three blocks",
    source="RMU 2403.03218",
    options=RMUOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        references=(Reference("retain", "hidden", options.layer),) if options.alpha > 0 else (),
    ),
    needs_note="forget, retain and reference unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    trains=trained_parameters,
    resolve=with_layer,
)
