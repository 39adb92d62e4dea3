"""BLUR (bi-level unlearning): the retain gradient yields to the forget gradient, once per optimizer step.

Loss: no weighted sum. With f, r the gradients of F and R over a step batch, the update direction is
d = r + xi f, xi = gamma - <r, f> / |f|^2. Without a clamp, <d, f> = gamma |f|^2 for every r.
The paper's ablations are options: variant=swapped, d = f + xi r, xi = gamma - <r, f> / |r|^2, lets the forget gradient
yield; variant=sum, d = f + gamma r, is the weighted sum of the losses.
F is that of npo, ga, rmu or simnpo; R is CE, KL, or RMU's distance of hidden states.
Needs: forget and retain data; outputs of the reference model unless forget_loss is ga or simnpo and retain_loss is nll.
Source: BLUR (Bi-Level UnleaRning), arXiv 2506.08164, as in its released code.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods import ga, npo, rmu, simnpo
from unlearning.methods.method import AnyMethod, Batch, Method, Needs, Reference
from unlearning.methods.stages import RunFacts, Settled
from unlearning.methods.terms import retain_references, retain_term
from unlearning.objectives.bilevel import Clamp, First, Scope
from unlearning.objectives.combination import Bilevel, Combination, WeightedSum
from unlearning.options import Condition, option

SOURCE = "BLUR 2506.08164"


SIMNPO_BETA = 4.5
"""SimNPO's published inverse temperature. The default of `simnpo` itself goes with that method's weights."""

_PROJECTS = Condition("variant is blur or swapped", lambda options: options.variant != "sum")
_PREFERS = Condition("forget_loss is npo or simnpo", lambda options: options.forget_loss in ("npo", "simnpo"))
_SIMPLE = Condition("forget_loss is simnpo", lambda options: options.forget_loss == "simnpo")
_HIDDEN = Condition(
    "forget_loss is rmu or retain_loss is hidden",
    lambda options: options.forget_loss == "rmu" or options.retain_loss == "hidden",
)
_STEERS = Condition("forget_loss is rmu", lambda options: options.forget_loss == "rmu")
_RELATIVE = Condition(
    "forget_loss is rmu and steering_coefficient is none",
    lambda options: options.forget_loss == "rmu" and options.steering_coefficient is None,
)


@dataclass(frozen=True)
class BLUROptions:
    """Options of BLUR: the two losses, the combination of their gradients, and the options of the losses.

    forget_loss=rmu with retain_loss=hidden is the released BLUR-RMU (WMDP, Zephyr-7B: steering coefficient 6.5, alpha
    800 or 1200, which is 1 / gamma here; learning_rate 5e-5, batches of 4, 150 steps). The released MUSE runs use npo
    with beta 0.05 (News) or 0.4 (Books), learning_rate 2.5e-5 or 1e-5, and no weight decay.
    """

    forget_loss: Literal["npo", "ga", "rmu", "simnpo"] = option(
        "npo", "loss on forget data: npo, ga, rmu or simnpo", source=SOURCE
    )
    retain_loss: Literal["nll", "kl", "hidden"] = option(
        "nll", "loss on retain data: nll, kl, or hidden (that of rmu, for forget_loss=rmu)", source=SOURCE
    )
    variant: Literal["blur", "swapped", "sum"] = option(
        "blur",
        "direction: blur, swapped (the forget gradient yields to the retain gradient) or sum (f + gamma r)",
        source=SOURCE,
    )
    gamma: float = option(
        0.1,
        "length of the step along the forget gradient (swapped, sum: along the retain gradient)",
        source="measured; BLUR 2506.08164: 1",
        above=0,
    )
    scope: Scope = option(
        "global",
        "parameters whose gradients form one vector: global (all), layer or tensor",
        source=SOURCE,
        read_if=_PROJECTS,
    )
    clamp: Clamp = option(
        "none",
        "none, nonnegative (xi >= 0) or pcgrad (project only if the gradients conflict)",
        source=SOURCE,
        read_if=_PROJECTS,
    )
    beta: float | None = option(
        None,
        f"inverse temperature of npo or simnpo (none: {npo.NPOOptions.beta} or {SIMNPO_BETA})",
        source="BLUR's TOFU code, SimNPO",
        above=0,
        read_if=_PREFERS,
    )
    delta: float = option(0.0, "margin of simnpo, in nats per token", source=simnpo.SOURCE, read_if=_SIMPLE)
    layer: int | None = option(
        None,
        "block that rmu steers, from 0 (none: at a quarter of the depth)",
        source=rmu.SOURCE,
        minimum=0,
        read_if=_HIDDEN,
    )
    steering_scale: float = option(
        5.0,
        "norm of the target vector of rmu, in mean norms of the block's output",
        source=rmu.ADAPTIVE,
        above=0,
        read_if=_RELATIVE,
    )
    massive_ratio: float | None = option(
        4.0,
        "leave tokens out of that mean whose norm is above this many medians (none: keep all)",
        above=1,
        read_if=_RELATIVE,
    )
    skip_first_token: bool = option(False, "leave the first token of each text out of that mean", read_if=_RELATIVE)
    steering_coefficient: float | None = option(
        None,
        "that norm itself, such as 6.5 (none: steering_scale mean norms)",
        source=rmu.SOURCE,
        above=0,
        read_if=_STEERS,
    )
    steering_seed: int = option(0, "seed of the direction of that vector", minimum=0, read_if=_STEERS)


_FORGET: dict[str, AnyMethod] = {"npo": npo.NPO, "ga": ga.GA, "rmu": rmu.RMU, "simnpo": simnpo.SIMNPO}


def loss_options(options: BLUROptions) -> object:
    """Return the options of the forget loss; its weights are not read, because gradients are combined instead."""
    if options.forget_loss == "npo":
        return npo.NPOOptions() if options.beta is None else npo.NPOOptions(beta=options.beta)
    if options.forget_loss == "simnpo":
        return simnpo.SimNPOOptions(beta=options.beta or SIMNPO_BETA, delta=options.delta)
    if options.forget_loss == "rmu":
        return _rmu_options(options)
    return ga.GAOptions()


def forget_loss(model: PreTrainedModel, batch: Batch, options: BLUROptions) -> Float[Tensor, ""]:
    """Compute F of the method that the option `forget_loss` names."""
    loss = _FORGET[options.forget_loss].forget_loss
    assert loss is not None
    return loss(model, batch, loss_options(options))


def retain_loss(model: PreTrainedModel, batch: Batch, options: BLUROptions) -> Float[Tensor, ""]:
    """Compute R: cross-entropy, KL(reference || model), or RMU's distance of hidden states from the reference."""
    if options.retain_loss == "hidden":
        return rmu.retain_loss(model, batch, _rmu_options(options))
    return retain_term(model, batch, options)


def needs(options: BLUROptions) -> Needs:
    """Return both data sets, and the quantities of the reference model that the two losses read."""
    forget = _FORGET[options.forget_loss].needs(loss_options(options)).references
    hidden = (Reference("retain", "hidden", options.layer),)
    kept = hidden if options.retain_loss == "hidden" else retain_references(options)
    return Needs(retain=True, references=(*(r for r in forget if r.data == "forget"), *kept))


def with_layer(model: PreTrainedModel, options: BLUROptions) -> BLUROptions:
    """Return the options with the index of the block, if a loss reads the output of a block."""
    if options.forget_loss != "rmu" and options.retain_loss != "hidden":
        return options
    return replace(options, layer=rmu.steered_layer(model, options.layer))


def trained_parameters(model: PreTrainedModel, options: BLUROptions) -> str | None:
    """Return RMU's pattern of down projections if the forget loss is RMU's; None (all parameters) otherwise."""
    if options.forget_loss != "rmu":
        return None
    return rmu.trained_parameters(model, _rmu_options(options))


def with_coefficient(model: PreTrainedModel, facts: RunFacts, options: BLUROptions) -> Settled:
    """Return the options with the norm of RMU's target vector, if the forget loss is RMU's."""
    if options.forget_loss != "rmu":
        return Settled(options)
    settled = rmu.with_coefficient(model, facts, _rmu_options(options))
    return replace(settled, options=replace(options, steering_coefficient=settled.options.steering_coefficient))


def _rmu_options(options: BLUROptions) -> rmu.RMUOptions:
    return rmu.RMUOptions(
        layer=options.layer,
        steering_scale=options.steering_scale,
        massive_ratio=options.massive_ratio,
        skip_first_token=options.skip_first_token,
        steering_coefficient=options.steering_coefficient,
        steering_seed=options.steering_seed,
    )


def combination(options: BLUROptions) -> Combination:
    """Return how the two gradients become one direction."""
    if options.variant == "sum":
        return WeightedSum(gamma=1.0, alpha=options.gamma)
    first: First = "forget" if options.variant == "blur" else "retain"
    return Bilevel(gamma=options.gamma, first=first, scope=options.scope, clamp=options.clamp)


BLUR = Method(
    name="blur",
    summary="d = r + xi f, xi = gamma - <r, f> / |f|^2; f, r gradients of F (npo, ga, rmu, simnpo) and R (CE, KL); "
    "swapped: d = f + xi r, xi = gamma - <r, f> / |r|^2; sum: d = f + gamma r",
    source=SOURCE,
    options=BLUROptions,
    needs=needs,
    needs_note="forget, retain, reference (unless ga or simnpo with nll)",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    combination=combination,
    trains=trained_parameters,
    resolve=with_layer,
    settle=with_coefficient,
)
