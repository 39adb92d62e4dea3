"""Negative preference optimisation: the forget answers as the losing side of a preference, with no winner."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.options import option


@dataclass(frozen=True)
class NPOOptions:
    """Inverse temperature, the retain loss and the weights of the two losses."""

    beta: float = option(0.1, "inverse temperature", source="NPO 2404.05868", above=0)
    gamma: float = option(1.0, "weight of the forget loss", source="NPO 2404.05868", minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source="NPO 2404.05868", minimum=0)
    retain_loss: RetainLoss = option("nll", "nll (NPO + RT) or kl (NPO + KL)", source="NPO 2404.05868")


def forget_loss(model: PreTrainedModel, batch: Batch, options: NPOOptions) -> Float[Tensor, ""]:
    """F = -(2 / beta) mean_b log sigmoid(beta (L_b - L_b^ref)); F >= 0."""
    assert batch.forget is not None and batch.forget.reference_nll is not None
    return losses.npo(
        answer_sequence_nll(model, batch.forget),
        batch.forget.reference_nll,
        beta=options.beta,
        n_sequences=batch.window.forget_sequences,
    )


NPO = Method(
    name="npo",
    summary="-(2 gamma / beta) mean log sigmoid(beta (NLL - NLL start)) + alpha R, R = CE or KL on retain",
    source="NPO 2404.05868",
    options=NPOOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0, references=(Reference("forget", "nll"), *retain_references(options))
    ),
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
