"""BLUR (bi-level unlearning): the retain gradient yields to the forget gradient, once per optimizer step.

Loss: no weighted sum. With f, r the gradients of F and R over a step batch, the update direction is
d = r + xi f, xi = gamma - <r, f> / |f|^2. Without a clamp, <d, f> = gamma |f|^2 for every r.
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
from unlearning.methods.terms import retain_references, retain_term
from unlearning.objectives.bilevel import Clamp, Scope
from unlearning.objectives.combination import Bilevel
from unlearning.options import option

SOURCE = "BLUR 2506.08164"


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
    gamma: float = option(1.0, "length of the step along the forget gradient", source=SOURCE, above=0)
    scope: Scope = option(
        "global", "parameters whose gradients form one vector: global (all), layer or tensor", source=SOURCE
    )
    clamp: Clamp = option(
        "none", "none, nonnegative (xi >= 0) or pcgrad (project only if the gradients conflict)", source=SOURCE
    )
    beta: float | None = option(
        None, "inverse temperature of npo or simnpo (none: 0.1 or 4.5)", source="BLUR's TOFU code, SimNPO", above=0
    )
    delta: float = option(0.0, "margin of simnpo, in nats per token", source=simnpo.SOURCE)
    layer: int | None = option(
        None, "block that rmu steers, from 0 (none: at a quarter of the depth)", source=rmu.SOURCE, minimum=0
    )
    steering_coefficient: float = option(6.5, "norm of the target vector of rmu", source=rmu.SOURCE, above=0)
    steering_seed: int = option(0, "seed of the direction of that vector", minimum=0)


_FORGET: dict[str, AnyMethod] = {"npo": npo.NPO, "ga": ga.GA, "rmu": rmu.RMU, "simnpo": simnpo.SIMNPO}


def loss_options(options: BLUROptions) -> object:
    """Return the options of the forget loss; its weights are not read, because gradients are combined instead."""
    if options.forget_loss == "npo":
        return npo.NPOOptions() if options.beta is None else npo.NPOOptions(beta=options.beta)
    if options.forget_loss == "simnpo":
        defaults = simnpo.SimNPOOptions()
        return simnpo.SimNPOOptions(beta=options.beta or defaults.beta, delta=options.delta)
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


def _rmu_options(options: BLUROptions) -> rmu.RMUOptions:
    return rmu.RMUOptions(
        layer=options.layer,
        steering_coefficient=options.steering_coefficient,
        steering_seed=options.steering_seed,
    )


BLUR = Method(
    name="blur",
    summary="d = r + xi f, xi = gamma - <r, f> / |f|^2; f, r gradients of F (npo, ga, rmu, simnpo) and R (CE, KL)",
    source=SOURCE,
    options=BLUROptions,
    needs=needs,
    needs_note="forget, retain, reference (unless ga or simnpo with nll)",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    combination=lambda options: Bilevel(gamma=options.gamma, scope=options.scope, clamp=options.clamp),
    trains=trained_parameters,
    resolve=with_layer,
)
