"""BLUR: forgetting first. The retain gradient gives way to the forget gradient, once per optimizer step."""

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
    """The two losses, how their gradients are combined, and the options of the losses.

    With forget_loss=rmu and retain_loss=hidden this is the released BLUR-RMU (WMDP, Zephyr-7B: steering coefficient
    6.5, alpha 800 or 1200 there, which is 1 / gamma here; learning_rate 5e-5, batches of 4, 150 steps). MUSE: npo with
    beta 0.05 (News) or 0.4 (Books), learning_rate 2.5e-5 or 1e-5, no weight decay.
    """

    forget_loss: Literal["npo", "ga", "rmu", "simnpo"] = option("npo", "npo, ga, rmu or simnpo", source=SOURCE)
    retain_loss: Literal["nll", "kl", "hidden"] = option(
        "nll", "nll, kl, or hidden (RMU's own, for forget_loss=rmu)", source=SOURCE
    )
    gamma: float = option(1.0, "step along the forget gradient", source=SOURCE, above=0)
    scope: Scope = option("global", "what is one vector: global (all parameters), layer or tensor", source=SOURCE)
    clamp: Clamp = option(
        "none", "none, nonnegative (xi >= 0) or pcgrad (projects only where the two conflict)", source=SOURCE
    )
    beta: float | None = option(
        None, "inverse temperature of npo and simnpo (none: 0.1 and 4.5)", source="BLUR's TOFU code, SimNPO", above=0
    )
    delta: float = option(0.0, "margin of simnpo, in nats a token", source=simnpo.SOURCE)
    layer: int | None = option(
        None, "block that rmu steers (none: the one that ends a quarter of the depth)", source=rmu.SOURCE, minimum=0
    )
    steering_coefficient: float = option(6.5, "norm of the vector that rmu steers to", source=rmu.SOURCE, above=0)
    steering_seed: int = option(0, "of that vector's direction", minimum=0)


_FORGET: dict[str, AnyMethod] = {"npo": npo.NPO, "ga": ga.GA, "rmu": rmu.RMU, "simnpo": simnpo.SIMNPO}


def loss_options(options: BLUROptions) -> object:
    """The forget loss's own options. Its weights are not read: gradients are weighed here, not losses."""
    if options.forget_loss == "npo":
        return npo.NPOOptions() if options.beta is None else npo.NPOOptions(beta=options.beta)
    if options.forget_loss == "simnpo":
        defaults = simnpo.SimNPOOptions()
        return simnpo.SimNPOOptions(beta=options.beta or defaults.beta, delta=options.delta)
    if options.forget_loss == "rmu":
        return _rmu_options(options)
    return ga.GAOptions()


def forget_loss(model: PreTrainedModel, batch: Batch, options: BLUROptions) -> Float[Tensor, ""]:
    """F of the method that the option `forget_loss` names."""
    loss = _FORGET[options.forget_loss].forget_loss
    assert loss is not None
    return loss(model, batch, loss_options(options))


def retain_loss(model: PreTrainedModel, batch: Batch, options: BLUROptions) -> Float[Tensor, ""]:
    """R: cross-entropy, divergence from the start model, or RMU's distance of a block's output from it."""
    if options.retain_loss == "hidden":
        return rmu.retain_loss(model, batch, _rmu_options(options))
    return retain_term(model, batch, options)


def needs(options: BLUROptions) -> Needs:
    """Both data sets, and the start model's constants that the two losses read."""
    forget = _FORGET[options.forget_loss].needs(loss_options(options)).references
    hidden = (Reference("retain", "hidden", options.layer),)
    kept = hidden if options.retain_loss == "hidden" else retain_references(options)
    return Needs(retain=True, references=(*(r for r in forget if r.data == "forget"), *kept))


def with_layer(model: PreTrainedModel, options: BLUROptions) -> BLUROptions:
    """The options with the number of the block whose output is read, where one is."""
    if options.forget_loss != "rmu" and options.retain_loss != "hidden":
        return options
    return replace(options, layer=rmu.steered_layer(model, options.layer))


def trained_parameters(model: PreTrainedModel, options: BLUROptions) -> str | None:
    """RMU's down projections where the forget loss is RMU's; all parameters otherwise."""
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
    needs_note="forget, retain, reference unless forget_loss=ga or simnpo and retain_loss=nll",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    combination=lambda options: Bilevel(gamma=options.gamma, scope=options.scope, clamp=options.clamp),
    trains=trained_parameters,
    resolve=with_layer,
)
