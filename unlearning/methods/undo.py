"""UNDO: an unlearned model is distilled into a noisy copy of itself, so that what was only suppressed is lost.

Start: theta = (1 - noise) theta_M + noise noise_scale N, M the unlearned model that is given, N Xavier's uniform
initialisation of a matrix and 0 for a vector. Then J = gamma F + alpha R, F = mean_t KL(p_t^M || p_t) over the tokens
of the forget answers, R the same over the retain answers.
Needs: a model that has been unlearned, forget and retain data, and logits of the model as given.
Source: Unlearn-Noise-Distill-on-Outputs (UNDO), arXiv 2506.06278. Differs: the paper distils on the pretraining data;
here on the texts that are given. Its code, too, shrinks vectors such as the gains of norms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.common.errors import InputError
from unlearning.methods.method import Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.methods.terms import forget_divergence, retain_divergence
from unlearning.objectives.gradients import placed_like
from unlearning.options import Condition, option

SOURCE = "UNDO 2506.06278"


@dataclass(frozen=True)
class UNDOOptions:
    """Options of UNDO."""

    noise: float = option(
        0.6, "share of the weights that noise replaces (0: none; 1: all)", source=SOURCE, minimum=0, maximum=1
    )
    noise_scale: float = option(
        0.1,
        "size of the noise, in that of a new model's weights",
        source=SOURCE,
        minimum=0,
        maximum=1,
        read_if=Condition("noise is above 0", lambda options: options.noise > 0),
    )
    noise_seed: int = option(
        0,
        "seed of the noise",
        minimum=0,
        read_if=Condition("noise and noise_scale are above 0", lambda options: options.noise * options.noise_scale > 0),
    )
    gamma: float = option(1.0, "weight of the divergence on forget answers (0: none)", source="ours", minimum=0)
    alpha: float = option(1.0, "weight of the divergence on retain answers (0: none)", source="ours", minimum=0)


def add_noise(parameters: Sequence[tuple[str, Tensor]], options: UNDOOptions) -> None:
    """Replace a share of the weights by noise, in place.

    Args:
        parameters: Names and values of the weights that train, whole or sharded.
        options: UNDO's options.

    Raises:
        InputError: An adapter trains, which holds none of the model's knowledge.
    """
    if any(".lora_" in name for name, _ in parameters):
        raise InputError("`lora_rank` is not supported by undo, which adds noise to the model's weights. Remove it.")
    generator = torch.Generator().manual_seed(options.noise_seed)
    for _, parameter in parameters:
        parameter.mul_(1 - options.noise)
        if parameter.dim() > 1:
            drawn = xavier(parameter.shape, generator)
            parameter.add_(placed_like(drawn, parameter), alpha=options.noise * options.noise_scale)


def xavier(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a new matrix, or a stack of matrices, from U(-a, a), a = sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / (shape[-1] + shape[-2]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def needs(options: UNDOOptions) -> Needs:
    """Return the data of the losses that have a weight, and the given model's logits on them."""
    weights = {"forget": options.gamma, "retain": options.alpha}
    references = tuple(Reference(data, "logits") for data in ("forget", "retain") if weights[data] > 0)
    return Needs(retain=options.alpha > 0, references=references)


UNDO = Method(
    name="undo",
    summary="gamma KL(M, p) on forget + alpha KL(M, p) on retain, from a noisy copy of the unlearned model M",
    source=SOURCE,
    options=UNDOOptions,
    needs=needs,
    needs_note="an unlearned model, forget, reference, retain unless alpha=0",
    forget_loss=forget_divergence,
    retain_loss=retain_divergence,
    start=add_noise,
    recipe=Recipe(learning_rate=2e-3, steps=1500, source="measured"),
)
