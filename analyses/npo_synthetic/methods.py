"""The unlearning methods of NPO's synthetic experiment: full-batch gradient descent on the toolkit's own losses.

An example is a sequence of one token from a vocabulary of two, whose logits are (z, 0). All seeds and all methods are
one tensor of weights: none touches another's, so the gradient of the sum of their losses holds each one's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.npo_synthetic.world import Models, World
from unlearning.common.errors import InputError
from unlearning.objectives import losses

ForgetLoss = Literal["ga", "idk", "npo", "dpo", "kto"]
RetainLoss = Literal["none", "nll", "kl"]

METRICS = ("forget_distance", "retain_distance", "forget_kl", "distance_to_retrained", "distance_to_finetuned")
"""Means over the evaluation examples, in nats: KL(retrained || model) on forget and on retain inputs, KL(fine-tuned ||
model) on forget inputs. Then the Euclidean distances of the trained layer from those of the two models."""


@dataclass(frozen=True)
class Method:
    """A loss and the learning rate of its gradient descent.

    Attributes:
        name: Name of its rows.
        forget: Loss of the forget examples.
        retain: Loss of the retain examples that is added to it with coefficient 1.
        learning_rate: Learning rate of gradient descent.
        beta: Inverse temperature, if the forget loss has one.
    """

    name: str
    forget: ForgetLoss
    retain: RetainLoss
    learning_rate: float
    beta: float | None = None


def compared(
    slow: float, npo: tuple[float, float], dpo: tuple[float, float], dpo_retain_rate: float
) -> tuple[Method, ...]:
    """Return the methods of the comparison.

    Args:
        slow: Learning rate of gradient ascent and of IDK.
        npo: Beta and learning rate of NPO, and of KTO, for which the paper's code gives none.
        dpo: Beta and learning rate of DPO.
        dpo_retain_rate: Learning rate of DPO with the retain loss.

    Returns:
        The methods, in the order of the tables.
    """
    (npo_beta, npo_rate), (dpo_beta, dpo_rate) = npo, dpo
    return (
        Method("GA", "ga", "none", slow),
        Method("GA+RT", "ga", "nll", slow),
        Method("GA+KL", "ga", "kl", slow),
        Method("IDK+RT", "idk", "nll", slow),
        Method("NPO", "npo", "none", npo_rate, npo_beta),
        Method("NPO+RT", "npo", "nll", npo_rate, npo_beta),
        Method("NPO+KL", "npo", "kl", npo_rate, npo_beta),
        Method("DPO", "dpo", "none", dpo_rate, dpo_beta),
        Method("DPO+RT", "dpo", "nll", dpo_retain_rate, dpo_beta),
        Method("DPO+KL", "dpo", "kl", dpo_rate, dpo_beta),
        Method("KTO", "kto", "none", npo_rate, npo_beta),
    )


COMPARED: dict[float, tuple[Method, ...]] = {
    1.0: compared(5e-4, npo=(1.0, 5e-3), dpo=(0.1, 5e-3), dpo_retain_rate=5e-3),
    0.0: compared(1e-4, npo=(10.0, 5e-2), dpo=(5.0, 5e-2), dpo_retain_rate=2e-2),
}
"""By alpha: 1, inputs to forget and to retain are apart; 0, they are alike and only their labels differ."""

LIMIT_ALPHA = 1.0
LIMIT = (
    Method("GA", "ga", "none", 5e-4),
    *(Method("NPO", "npo", "none", 5e-4, beta) for beta in (0.01, 0.1, 0.2, 0.5, 1.0)),
)
"""NPO goes to gradient ascent as beta goes to 0: all with one learning rate."""


@dataclass(frozen=True, eq=False)
class _Reference:
    """Log-probabilities of the fine-tuned model, constants of the losses, flat over seeds and examples."""

    forget_nll: Float[Tensor, " token"]
    idk_nll: Float[Tensor, " token"]
    forget_logits: Float[Tensor, "token 2"]
    retain_logits: Float[Tensor, "token 2"]


def class_logits(logit: Float[Tensor, "*batch"]) -> Float[Tensor, "token 2"]:
    """Return the logits (z, 0) of every example."""
    flat = logit.flatten()
    return torch.stack([flat, torch.zeros_like(flat)], dim=1)


def first_logit(
    features: Float[Tensor, "seed example feature"], second_layer: Float[Tensor, "seed feature"]
) -> Float[Tensor, "seed example"]:
    """Compute z = relu(W x) . a."""
    return (features @ second_layer[..., None])[..., 0]


def reference(world: World, models: Models) -> _Reference:
    """Compute the fine-tuned model's log-probabilities of the training examples."""
    forget = class_logits(first_logit(world.forget, models.finetuned))
    retain = class_logits(first_logit(world.retain, models.finetuned))
    return _Reference(
        forget_nll=losses.token_nll(forget, world.forget_labels.flatten()),
        idk_nll=losses.token_nll(forget, world.idk_labels.flatten()),
        forget_logits=forget,
        retain_logits=retain,
    )


def loss(
    method: Method,
    world: World,
    constants: _Reference,
    forget_logit: Float[Tensor, "seed forget"],
    retain_logit: Float[Tensor, "seed retain"],
) -> Float[Tensor, ""]:
    """Compute a method's loss, a mean over examples in each seed, summed over the seeds.

    Args:
        method: The method.
        world: Labels of the examples.
        constants: Log-probabilities of the fine-tuned model.
        forget_logit: z of the model on the forget examples.
        retain_logit: z on the retain examples; not read without a retain loss.

    Returns:
        The loss, in nats.
    """
    value = _forget_loss(method, world, constants, forget_logit)
    n_retain = retain_logit.shape[1]
    if method.retain == "nll":
        nll = losses.token_nll(class_logits(retain_logit), world.retain_labels.flatten())
        return value + losses.pooled_cross_entropy(nll, n_retain)
    if method.retain == "kl":
        return value + losses.token_divergence(class_logits(retain_logit), constants.retain_logits).sum() / n_retain
    return value


def _forget_loss(
    method: Method, world: World, constants: _Reference, logit: Float[Tensor, "seed forget"]
) -> Float[Tensor, ""]:
    logits, n = class_logits(logit), logit.shape[1]

    def nll(labels: Int[Tensor, "seed forget"]) -> Float[Tensor, " token"]:
        return losses.token_nll(logits, labels.flatten())

    if method.forget == "idk":
        return losses.pooled_cross_entropy(nll(world.idk_labels), n)
    forgotten = nll(world.forget_labels)
    if method.forget == "ga":
        return -losses.pooled_cross_entropy(forgotten, n)
    assert method.beta is not None
    if method.forget == "npo":
        return losses.npo(forgotten, constants.forget_nll, beta=method.beta, n_sequences=n)
    if method.forget == "dpo":
        return losses.dpo(
            nll(world.idk_labels),
            constants.idk_nll,
            forgotten,
            constants.forget_nll,
            beta=method.beta,
            n_sequences=n,
        )
    # KTO measures from KL(model || fine-tuned) on the forget inputs, a number of each seed.
    moved = losses.token_divergence(constants.forget_logits, logits).view_as(logit).mean(dim=1).tolist()
    rows = zip(forgotten.view_as(logit), constants.forget_nll.view_as(logit), moved, strict=True)
    values = [losses.kto(ours, theirs, kl_estimate=kl, beta=method.beta, n_sequences=n) for ours, theirs, kl in rows]
    return torch.stack(values).sum()


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The metrics of unlearning runs over their steps.

    Attributes:
        steps: Number of updates before each evaluation.
        values: The metrics, in the order of `METRICS`.
        second_layers: Second-layer weights after the last update.
    """

    steps: list[int]
    values: Float[Tensor, "evaluation metric seed method"]
    second_layers: Float[Tensor, "seed feature method"]


def unlearn(
    world: World,
    models: Models,
    methods: Sequence[Method],
    *,
    steps: int,
    evaluate_every: int,
    advance: Callable[[float], None] = lambda _: None,
) -> Trajectories:
    """Run every method from the fine-tuned model of every seed.

    Args:
        world: Data of every seed.
        models: Models to start from and to compare with.
        methods: The methods.
        steps: Number of updates.
        evaluate_every: Updates between two evaluations; the first evaluation is of the fine-tuned model.
        advance: Called with the share of the steps done since the last call.

    Returns:
        The metrics of every method and seed at every evaluation.

    Raises:
        InputError: A weight of a method is not finite.
    """
    constants, targets = reference(world, models), _targets(world, models)
    with_retain = [place for place, method in enumerate(methods) if method.retain != "none"]
    column = {place: number for number, place in enumerate(with_retain)}
    rates = torch.tensor([method.learning_rate for method in methods], dtype=torch.float64)
    nothing = world.retain.new_empty(world.retain.shape[:2])
    second_layers = models.finetuned[..., None].repeat(1, 1, len(methods))
    evaluated, values = [], []
    for step in range(steps):
        if step % evaluate_every == 0:
            values.append(measure(world, models, targets, second_layers))
            _check_finite(values[-1], methods, step)
            evaluated.append(step)
            advance(min(evaluate_every, steps - step) / steps)
        second_layers.requires_grad_(True)
        forget = (world.forget @ second_layers).unbind(-1)
        retain = (world.retain @ second_layers[..., with_retain]).unbind(-1) if with_retain else ()
        total = torch.stack(
            [
                loss(method, world, constants, forget[place], retain[column[place]] if place in column else nothing)
                for place, method in enumerate(methods)
            ]
        ).sum()
        (gradient,) = torch.autograd.grad(total, second_layers)
        second_layers = second_layers.detach() - rates * gradient
    return Trajectories(evaluated, torch.stack(values), second_layers)


@dataclass(frozen=True, eq=False)
class _Targets:
    """Logits of the models that the metrics compare with, on the evaluation examples."""

    retrained_forget: Float[Tensor, "seed evaluation"]
    retrained_retain: Float[Tensor, "seed evaluation"]
    finetuned_forget: Float[Tensor, "seed evaluation"]


def _targets(world: World, models: Models) -> _Targets:
    return _Targets(
        retrained_forget=first_logit(world.evaluation_forget, models.retrained),
        retrained_retain=first_logit(world.evaluation_retain, models.retrained),
        finetuned_forget=first_logit(world.evaluation_forget, models.finetuned),
    )


def measure(
    world: World, models: Models, targets: _Targets, second_layers: Float[Tensor, "seed feature method"]
) -> Float[Tensor, "metric seed method"]:
    """Compute the metrics of every seed and method, in the order of `METRICS`."""
    forget, retain = world.evaluation_forget @ second_layers, world.evaluation_retain @ second_layers
    return torch.stack(
        [
            mean_divergence(forget, targets.retrained_forget),
            mean_divergence(retain, targets.retrained_retain),
            mean_divergence(forget, targets.finetuned_forget),
            (second_layers - models.retrained[..., None]).norm(dim=1),
            (second_layers - models.finetuned[..., None]).norm(dim=1),
        ]
    )


def mean_divergence(
    logit: Float[Tensor, "seed example method"], target: Float[Tensor, "seed example"]
) -> Float[Tensor, "seed method"]:
    """KL(target || model), mean over the examples."""
    reference_logits = class_logits(target[..., None].expand_as(logit))
    return losses.token_divergence(class_logits(logit), reference_logits).view_as(logit).mean(dim=1)


def _check_finite(values: Float[Tensor, "metric seed method"], methods: Sequence[Method], step: int) -> None:
    for place, method in enumerate(methods):
        if not bool(values[..., place].isfinite().all()):
            raise InputError(
                f"{method.name}: no finite numbers any more at step {step}; take a smaller learning rate than "
                f"{method.learning_rate:g}"
            )
