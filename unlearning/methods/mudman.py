"""MUDMAN: forget along the coordinates in which that also lowers the retain loss, as it looks to an adversary.

Direction: d = m f / ||f|| + alpha a. f is the gradient of F = -mean_t H(p_t) over the forget answers' tokens, taken at
an adversary's weights; a <- .9 a + .1 r with r the gradient of R = CE(retain) at the present weights; m is 1 where a
and f have the same sign, else 0; ||f|| is over all trained weights, before the mask. The adversary begins again from
the present weights every 32 steps; every step he takes one step of plain gradient descent on CE(forget), then f is
taken at his weights. Trains the gates of the MLPs alone, or all maps into them.
Needs: forget and retain data. A step costs one more forward and backward pass over the forget examples, and 12 bytes
more per trained parameter: a, the adversary's weights, and the present ones meanwhile.
Source: MUDMAN, arXiv 2506.12484. Differs: there d is descended as it is, with rates .1 and .001 of its two terms; here
it is what the optimizer reads (Adam, whose momentum also moves a coordinate that the mask just closed). The public code
runs f's backward pass over activations from before the adversary's step with weights from after it, which is the
gradient at neither; here both are from after it. R is not a divergence from the reference model, since that has no
gradient before training, and without one the mask closes every coordinate.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.methods.method import Method, Needs
from unlearning.methods.recipe import Recipe
from unlearning.methods.rmu import mlp_maps
from unlearning.methods.terms import forget_cross_entropy, negative_entropy, retain_cross_entropy
from unlearning.objectives.combination import Combination, SignMask
from unlearning.objectives.displacement import Adversary, Displacement
from unlearning.objectives.forward import blocks, unwrapped
from unlearning.options import option

SOURCE = "MUDMAN 2506.12484"


@dataclass(frozen=True)
class MUDMANOptions:
    """Options of MUDMAN."""

    trained_maps: Literal["gate", "inputs"] = option(
        "gate", "maps that train: gate (the MLPs' gates) or inputs (all maps into the MLPs)", source=SOURCE
    )
    alpha: float = option(
        0.01, "weight of the retain gradients' average, beside a forget gradient of length 1", source=SOURCE, above=0
    )
    retain_momentum: float = option(
        0.9, "share of the retain gradients' average that a step keeps", source=SOURCE, minimum=0, below=1
    )
    adversary_learning_rate: float = option(
        0.001, "the adversary's learning rate (plain gradient descent)", source=SOURCE, above=0
    )
    adversary_every: int = option(
        32, "steps after which the adversary begins again from the present weights", source=SOURCE, minimum=1
    )


def displacement(options: MUDMANOptions) -> Displacement:
    """Return the adversary at whose weights the forget gradient is taken."""
    return Adversary(forget_cross_entropy, options.adversary_learning_rate, options.adversary_every)


def combination(options: MUDMANOptions) -> Combination:
    """Return the masked sum of the two gradients."""
    return SignMask(momentum=options.retain_momentum, alpha=options.alpha)


def trained_parameters(model: PreTrainedModel, options: MUDMANOptions) -> frozenset[str]:
    """Return the names of the weights of the MLPs' gates, or of all maps from the residual stream into the MLPs.

    Args:
        model: The model.
        options: MUDMAN's options.

    Returns:
        Names of parameters.

    Raises:
        InputError: The model has no such maps.
    """
    d_model = int(unwrapped(model).config.get_text_config().hidden_size)
    chosen = {id(weight) for block in blocks(model) for weight in _weights(block, d_model, options)}
    if not chosen:
        what = "gates (gate_proj)" if options.trained_maps == "gate" else "maps into the MLPs"
        other = "Set `trained_maps` to inputs, or `" if options.trained_maps == "gate" else "Set `"
        raise InputError(
            f"`trained_maps` {options.trained_maps}: {what} were not found in {type(unwrapped(model)).__name__}. "
            f"{other}train_parameters` to a regular expression of the weights to train."
        )
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in chosen)


def _weights(block: nn.Module, d_model: int, options: MUDMANOptions) -> list[Tensor]:
    return [
        block.get_submodule(name).get_parameter("weight")
        for name, width_in, width_out in mlp_maps(block)
        if width_in == d_model != width_out and (options.trained_maps == "inputs" or name.endswith("gate_proj"))
    ]


MUDMAN = Method(
    name="mudman",
    summary="d = m f/|f| + alpha a; f the gradient of -mean entropy of the forget answers at an adversary's weights, a "
    "the running mean of the gradient of CE(retain), m = 1 where their signs agree",
    source=SOURCE,
    options=MUDMANOptions,
    needs=lambda _: Needs(retain=True),
    needs_note="forget, retain",
    forget_loss=negative_entropy,
    retain_loss=retain_cross_entropy,
    combination=combination,
    displacement=displacement,
    trains=trained_parameters,
    recipe=Recipe(learning_rate=8e-3, epochs=20, source="measured; MUDMAN: 300 steps of 16 texts without Adam"),
)
