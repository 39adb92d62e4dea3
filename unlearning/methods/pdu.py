"""PDU (primal-dual unlearning): flat logits on the forget set, under the constraint CE(retain) <= epsilon.

Loss: J = gamma F + lambda (CE(retain) - epsilon), F = mean_t (max_v z_tv - mean_v z_tv)^2 >= 0; after each step that
follows the warm-up, lambda <- max(0, lambda + eta (CE(retain) - epsilon)). While lambda is 0, the constraint holds:
CE(retain) is measured at every step all the same, without its gradient.
Needs: forget and retain data.
Source: Constrained Entropic Unlearning (PDU), arXiv 2506.05314.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.stages import RunFacts, Settled
from unlearning.methods.terms import retain_cross_entropy
from unlearning.objectives import losses
from unlearning.objectives.combination import DualAscent
from unlearning.objectives.forward import answer_logits
from unlearning.options import Condition, option

SOURCE = "PDU 2506.05314, TOFU"


_ASCENDS = Condition("eta is above 0", lambda options: options.eta > 0)
_BY_SHARE = Condition(
    "eta is above 0 and dual_warmup_steps is none",
    lambda options: options.eta > 0 and options.dual_warmup_steps is None,
)


@dataclass(frozen=True)
class PDUOptions:
    """Options of PDU.

    The paper's warm-up is 5 of 10 to 30 epochs (on TOFU's forget10 with 32 examples per step, 65 of 130 to 390 steps).
    """

    epsilon: float = option(
        0.3,
        "upper bound of CE(retain), in nats; choose it a little above that of the reference model",
        source=SOURCE,
        minimum=0,
        read_if=_ASCENDS,
    )
    lambda0: float = option(50.0, "initial multiplier of the retain loss", source=SOURCE, minimum=0)
    eta: float = option(5.0, "step size of the dual ascent (1 on MUSE)", source=SOURCE, minimum=0)
    dual_warmup_ratio: float = option(
        0.25,
        "share of the run before the multiplier changes; the paper's is 1/6 to 1/2",
        source=SOURCE,
        minimum=0,
        below=1,
        read_if=_BY_SHARE,
    )
    dual_warmup_steps: int | None = option(
        None, "the same in optimizer steps (none: dual_warmup_ratio of the run)", minimum=0, read_if=_ASCENDS
    )
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: PDUOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t (max_v z_tv - mean_v z_tv)^2 >= 0."""
    assert batch.forget is not None
    return losses.pdu(answer_logits(model, batch.forget).logits, n_tokens=batch.step_batch.forget_tokens)


def with_warmup(_model: PreTrainedModel, facts: RunFacts, options: PDUOptions) -> Settled:
    """Return the options with the number of steps of the warm-up, rounded down."""
    if options.dual_warmup_steps is not None:
        return Settled(options)
    return Settled(replace(options, dual_warmup_steps=int(options.dual_warmup_ratio * facts.steps)))


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
        warmup_steps=options.dual_warmup_steps or 0,
    ),
    settle=with_warmup,
)
