"""UNDIAL: the start model with the forget token's logit lowered is the teacher of its own forgetting."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits
from unlearning.options import option


@dataclass(frozen=True)
class UNDIALOptions:
    """How far the teacher's logit is lowered, the retain loss (the paper has none) and the weights of the two.

    The paper trains LoRA of rank 8 at a learning rate of 1e-4.
    """

    beta: float = option(10.0, "how far the forget token's logit is lowered", source="UNDIAL 2402.10052", minimum=0)
    gamma: float = option(1.0, "weight of the forget loss", source="UNDIAL 2402.10052", minimum=0)
    alpha: float = option(0.0, "weight of the retain loss (0: none)", source="UNDIAL 2402.10052", minimum=0)
    retain_loss: RetainLoss = option("nll", "nll or kl")


def forget_loss(model: PreTrainedModel, batch: Batch, options: UNDIALOptions) -> Float[Tensor, ""]:
    """F = mean_t CE(q_t, p_t), q = softmax(z_start - beta e_y); F >= 0."""
    assert batch.forget is not None and batch.forget.reference_logits is not None
    answers = answer_logits(model, batch.forget)
    return losses.undial(
        answers.logits,
        batch.forget.reference_logits,
        answers.targets,
        beta=options.beta,
        n_tokens=batch.window.forget_tokens,
    )


UNDIAL = Method(
    name="undial",
    summary="gamma CE(softmax(start's logits - beta at the token), p) on forget + alpha R",
    source="UNDIAL 2402.10052",
    options=UNDIALOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0, references=(Reference("forget", "logits"), *retain_references(options))
    ),
    needs_note="forget, reference, retain if alpha>0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
