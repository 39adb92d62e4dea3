"""PDU: flat logits on the forget set, under the constraint that the retain loss stays below a bound."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import retain_cross_entropy
from unlearning.objectives import losses
from unlearning.objectives.combination import DualAscent
from unlearning.objectives.forward import answer_logits
from unlearning.options import option

SOURCE = "PDU 2506.05314, TOFU"


@dataclass(frozen=True)
class PDUOptions:
    """The bound of the retain loss and how its multiplier moves.

    Five epochs of TOFU's forget10 at 32 examples a step are 65 steps of warm-up; 10 to 30 epochs are trained.
    """

    epsilon: float = option(
        0.3, "bound of CE(retain) in nats; a little above the start model's", source=SOURCE, minimum=0
    )
    lambda0: float = option(50.0, "first multiplier of the retain loss", source=SOURCE, minimum=0)
    eta: float = option(5.0, "step of the dual ascent (1 on MUSE)", source=SOURCE, minimum=0)
    dual_warmup_steps: int = option(65, "optimizer steps before the multiplier moves", source=SOURCE, minimum=0)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: PDUOptions) -> Float[Tensor, ""]:
    """F = mean_t (max_v z - mean_v z)^2; F >= 0."""
    assert batch.forget is not None
    return losses.pdu(answer_logits(model, batch.forget).logits, n_tokens=batch.window.forget_tokens)


PDU = Method(
    name="pdu",
    summary="gamma mean (max logit - mean logit)^2 on forget + lambda (CE(retain) - epsilon), "
    "lambda <- max(0, lambda + eta (CE(retain) - epsilon))",
    source="PDU 2506.05314",
    options=PDUOptions,
    needs=lambda _options: Needs(retain=True),
    needs_note="forget, retain",
    forget_loss=forget_loss,
    retain_loss=retain_cross_entropy,
    combination=lambda options: DualAscent(
        gamma=options.gamma,
        multiplier=options.lambda0,
        epsilon=options.epsilon,
        eta=options.eta,
        warmup_steps=options.dual_warmup_steps,
    ),
)
