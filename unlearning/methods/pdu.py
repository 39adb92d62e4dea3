"""PDU (primal-dual unlearning): flat logits on the forget set, under the constraint CE(retain) <= epsilon.

Loss: J = gamma F + lambda (CE(retain) - epsilon), F = mean_t (max_v z_tv - mean_v z_tv)^2 >= 0; after each step that
follows the warm-up, lambda <- max(0, lambda + eta (CE(retain) - epsilon)).
Needs: forget and retain data.
Source: Constrained Entropic Unlearning (PDU), arXiv 2506.05314.
"""

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
    """Options of PDU.

    The warm-up of 65 steps is 5 epochs of TOFU's forget10 with 32 examples per step; the paper trains 10 to 30 epochs.
    """

    epsilon: float = option(
        0.3,
        "upper bound of CE(retain), in nats; choose it a little above that of the reference model",
        source=SOURCE,
        minimum=0,
    )
    lambda0: float = option(50.0, "initial multiplier of the retain loss", source=SOURCE, minimum=0)
    eta: float = option(5.0, "step size of the dual ascent (1 on MUSE)", source=SOURCE, minimum=0)
    dual_warmup_steps: int = option(65, "optimizer steps before the multiplier changes", source=SOURCE, minimum=0)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: PDUOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t (max_v z_tv - mean_v z_tv)^2 >= 0."""
    assert batch.forget is not None
    return losses.pdu(answer_logits(model, batch.forget).logits, n_tokens=batch.step_batch.forget_tokens)


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
