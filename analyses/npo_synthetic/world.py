"""The world of NPO's synthetic experiment: data, random features, the fine-tuned and the retrained model.

Two classes, p(y = 0 | x) = sigmoid(relu(W x) . a), with W drawn once and only a trained, from 0 and without bias.
Inputs are Gaussian around -alpha (retain) and +alpha (forget) in every coordinate; the likelier class is 0 on retain
and 1 on forget, with p = sigmoid(1 + (x - mean) . 1 / sqrt(d)). Every draw of a seed comes from one generator in a
fixed order, so that a seed's world is the same alone and beside others, and the same as in the paper's code.

Source: Negative Preference Optimization, arXiv 2404.05868, section 4, and its public code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unlearning.common.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """Sizes and lengths of the whole experiment; the defaults are the paper's.

    Attributes:
        seeds: Random seeds, one world each.
        steps: Steps of unlearning in the comparison of methods.
        evaluate_every: Steps between two evaluations in the comparison.
        limit_steps: Steps of unlearning in the limit of NPO to gradient ascent.
        limit_evaluate_every: Steps between two evaluations in the limit.
        finetuning_steps: Steps of full-batch gradient descent of the fine-tuned and the retrained model.
        finetuning_rate: Learning rate of these.
        d_input: Coordinates of an input.
        n_features: Number of random features.
        n_retain, n_forget: Examples to train on.
        n_evaluation: Examples to evaluate on, for each of the two sets.
    """

    seeds: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    steps: int = 2000
    evaluate_every: int = 25
    limit_steps: int = 10_000
    limit_evaluate_every: int = 5
    finetuning_steps: int = 20_000
    finetuning_rate: float = 0.05
    d_input: int = 16
    n_features: int = 128
    n_retain: int = 1000
    n_forget: int = 200
    n_evaluation: int = 1000


@dataclass(frozen=True, eq=False)
class World:
    """The worlds of all seeds, stacked; everything is float64.

    Attributes:
        features: The frozen first layer, W.
        retain, forget, evaluation_retain, evaluation_forget: Features relu(W x) of the examples.
        retain_labels, forget_labels, idk_labels: Classes; IDK labels are uniform answers to the forget inputs.
    """

    features: Float[Tensor, "seed feature d_input"]
    retain: Float[Tensor, "seed retain feature"]
    forget: Float[Tensor, "seed forget feature"]
    retain_labels: Int[Tensor, "seed retain"]
    forget_labels: Int[Tensor, "seed forget"]
    idk_labels: Int[Tensor, "seed forget"]
    evaluation_retain: Float[Tensor, "seed evaluation feature"]
    evaluation_forget: Float[Tensor, "seed evaluation feature"]


@dataclass(frozen=True, eq=False)
class Models:
    """Second-layer weights of the model that unlearning starts from and of the model that it should reach.

    Attributes:
        finetuned: Weights trained on retain and forget examples.
        retrained: Weights trained on the retain examples alone.
    """

    finetuned: Float[Tensor, "seed feature"]
    retrained: Float[Tensor, "seed feature"]


LARGEST_GRADIENT = 1e-2
"""A model whose last gradient is longer than this has not been fine-tuned to its end."""


def draw_world(alpha: float, protocol: Protocol) -> World:
    """Draw every seed's world.

    Args:
        alpha: Retain inputs are centred on -alpha, forget inputs on +alpha.
        protocol: Seeds and sizes.

    Returns:
        The worlds of all seeds, stacked.
    """
    worlds = [_draw_seed(seed, alpha, protocol) for seed in protocol.seeds]
    return World(*(torch.stack(parts) for parts in zip(*worlds, strict=True)))


def _draw_seed(seed: int, alpha: float, protocol: Protocol) -> tuple[Tensor, ...]:
    """Draw one seed's part of a `World` in the public code's order: W, retain, forget, IDK labels, evaluation."""
    generator = torch.Generator().manual_seed(seed)
    first_layer = torch.randn(protocol.n_features, protocol.d_input, dtype=torch.float64, generator=generator)
    first_layer /= protocol.d_input**0.5

    def draw(n: int, *, is_forget: bool) -> tuple[Tensor, Tensor]:
        mean, likelier_class = (alpha, 1) if is_forget else (-alpha, 0)
        inputs, labels = _draw_examples(n, protocol.d_input, mean, likelier_class, generator)
        return (inputs @ first_layer.T).relu(), labels

    retain, retain_labels = draw(protocol.n_retain, is_forget=False)
    forget, forget_labels = draw(protocol.n_forget, is_forget=True)
    uniform = torch.full((protocol.n_forget, 2), 0.5, dtype=torch.float64)
    idk_labels = torch.multinomial(uniform, 1, generator=generator)[:, 0]
    evaluation_retain, _ = draw(protocol.n_evaluation, is_forget=False)
    evaluation_forget, _ = draw(protocol.n_evaluation, is_forget=True)
    return (
        first_layer,
        retain,
        forget,
        retain_labels,
        forget_labels,
        idk_labels,
        evaluation_retain,
        evaluation_forget,
    )


def _draw_examples(
    n: int, d_input: int, mean: float, likelier_class: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n d_input"], Int[Tensor, " n"]]:
    """Inputs and labels, one example after the other, as their order in the generator's stream asks for."""
    # The public code draws a mixture's component for every example first. There is one here, and its draws are made
    # for those that follow.
    torch.multinomial(torch.ones(1), n, replacement=True, generator=generator)
    inputs = torch.empty(n, d_input, dtype=torch.float64)
    labels = torch.empty(n, dtype=torch.int64)
    for row in range(n):
        noise = torch.randn(d_input, dtype=torch.float64, generator=generator)
        inputs[row] = mean + noise
        logits = torch.zeros(2, dtype=torch.float64)
        logits[likelier_class] = 1 + noise.sum() / d_input**0.5
        labels[row] = torch.multinomial(logits.softmax(0), 1, generator=generator)[0]
    return inputs, labels


def finetune(world: World, protocol: Protocol, advance: Callable[[float], None] = lambda _: None) -> Models:
    """Train the fine-tuned and the retrained model of every seed by full-batch gradient descent from 0.

    Both are trained in one product. They differ in the weights of the examples: 1 / (n_retain + n_forget) on all of
    them, or 1 / n_retain on the retain examples. The gradient of the mean cross-entropy is sum_i weight_i (p_i - [y_i =
    0]) z_i.

    Args:
        world: Data of every seed.
        protocol: Length and learning rate.
        advance: Called with the share of the training done since the last call.

    Returns:
        Second-layer weights of both models for every seed.

    Raises:
        InputError: A gradient at the end is longer than `LARGEST_GRADIENT`.
    """
    features = torch.cat([world.retain, world.forget], dim=1)
    transposed = features.mT.contiguous()
    is_first_class = (torch.cat([world.retain_labels, world.forget_labels], dim=1) == 0)[..., None].to(features)
    n_retain, n_all = world.retain.shape[1], features.shape[1]
    weight = features.new_full((n_all, 2), 1 / n_all)
    weight[:, 1] = 0
    weight[:n_retain, 1] = 1 / n_retain

    second_layers = features.new_zeros(len(features), features.shape[2], 2)
    gradient = second_layers
    for step in range(protocol.finetuning_steps):
        if step % 100 == 0:
            advance(min(100, protocol.finetuning_steps - step) / protocol.finetuning_steps)
        gradient = transposed @ (weight * ((features @ second_layers).sigmoid() - is_first_class))
        second_layers = second_layers - protocol.finetuning_rate * gradient
    for place, name in enumerate(("fine-tuned", "retrained")):
        lengths = gradient[..., place].norm(dim=1)
        for seed, length in zip(protocol.seeds, lengths.tolist(), strict=True):
            if not length <= LARGEST_GRADIENT:
                raise InputError(
                    f"seed {seed}: the {name} model has not converged, its gradient after {protocol.finetuning_steps} "
                    f"steps is {length:.2g} long (at most {LARGEST_GRADIENT:g}); give more --finetuning-steps"
                )
    return Models(finetuned=second_layers[..., 0], retrained=second_layers[..., 1])
