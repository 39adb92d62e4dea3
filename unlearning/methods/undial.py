"""UNDIAL (self-distillation): the teacher is the reference model with the logit of the forget token lowered.

Loss: J = gamma F + alpha R, F = mean_t CE(q_t, p_t) >= 0, q_t = softmax(z_t^ref - beta e_y).
Needs: forget data, logits of the reference model; retain data if alpha > 0.
Source: UNDIAL, arXiv 2402.10052.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits
from unlearning.options import FORGETS, KEEPS, option


@dataclass(frozen=True)
class UNDIALOptions:
    """Options of UNDIAL; the paper has no retain loss.

    The paper trains a LoRA adapter of rank 8 with learning rate 1e-4.
    """

    beta: float = option(
        10.0,
        "amount by which the logit of the forget token is lowered",
        source="UNDIAL 2402.10052",
        minimum=0,
        read_if=FORGETS,
    )
    gamma: float = option(1.0, "weight of the forget loss", source="UNDIAL 2402.10052", minimum=0)
    alpha: float = option(
        1.0, "weight of the retain loss (0: none)", source="measured; UNDIAL 2402.10052: 0", minimum=0
    )
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: UNDIALOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t CE(q_t, p_t) >= 0, q_t = softmax(z_t^ref - beta e_y)."""
    assert batch.forget is not None and batch.forget.reference_logits is not None
    answers = answer_logits(model, batch.forget)
    return losses.undial(
        answers.logits,
        batch.forget.reference_logits,
        answers.targets,
        beta=options.beta,
        n_tokens=batch.step_batch.forget_tokens,
    )


UNDIAL = Method(
    name="undial",
    summary="gamma mean_t CE(softmax(z_ref - beta at the token), p) on forget + alpha R",
    source="UNDIAL 2402.10052",
    options=UNDIALOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0, references=(Reference("forget", "logits"), *retain_references(options))
    ),
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
