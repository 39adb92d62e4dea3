"""SatImp (saturation and importance): gradient ascent on tokens that are neither forgotten nor certain.

Loss: J = gamma F + alpha R, F = mean_t sg(p_t^beta1 (1 - p_t)^beta2) log p_t <= 0, p_t the probability of token y_t.
Needs: forget data; retain data unless alpha = 0; logits of the reference model if retain_loss is kl.
Source: Exploring Criteria of Loss Reweighting (SatImp), arXiv 2505.11953.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_nll
from unlearning.options import FORGETS, KEEPS, option


@dataclass(frozen=True)
class SatImpOptions:
    """Options of SatImp.

    In the paper the forget loss weighs ten times as much as the retain loss, on answers of moderate probability. The
    weight of a token that is certain is nearly 0, so that answers which a model knows well need a larger one.
    """

    beta1: float = option(
        5.0, "power of p in the weight of a token (saturation)", source="SatImp 2505.11953", minimum=0, read_if=FORGETS
    )
    beta2: float = option(
        1.0,
        "power of 1 - p in the weight of a token (importance)",
        source="SatImp 2505.11953",
        minimum=0,
        read_if=FORGETS,
    )
    gamma: float = option(100.0, "weight of the forget loss", source="measured; SatImp 2505.11953: 1", minimum=0)
    alpha: float = option(
        1.0, "weight of the retain loss (0: none)", source="measured; SatImp 2505.11953: 0.1", minimum=0
    )
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source="open-unlearning", read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: SatImpOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t sg(p_t^beta1 (1 - p_t)^beta2) log p_t <= 0."""
    assert batch.forget is not None
    return losses.satimp(
        answer_nll(model, batch.forget),
        beta1=options.beta1,
        beta2=options.beta2,
        n_tokens=batch.step_batch.forget_tokens,
    )


SATIMP = Method(
    name="satimp",
    summary="gamma mean sg(p^beta1 (1 - p)^beta2) log p on forget + alpha R, R = CE or KL on retain",
    source="SatImp 2505.11953",
    options=SatImpOptions,
    needs=lambda options: Needs(retain=options.alpha > 0, references=retain_references(options)),
    needs_note="forget, retain unless alpha=0, reference if retain_loss=kl",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
