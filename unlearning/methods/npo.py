"""NPO (negative preference optimisation): the forget answer is the losing side of a preference, without a winning side.

Loss: J = gamma F + alpha R, F = -(2 / beta) mean_b log sigmoid(beta (L_b - L_b^ref)) >= 0.
Needs: forget data, sequence losses of the reference model; retain data unless alpha = 0.
Source: Negative Preference Optimization, arXiv 2404.05868, equation 3.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.options import FORGETS, KEEPS, option


@dataclass(frozen=True)
class NPOOptions:
    """Options of NPO."""

    beta: float = option(
        0.1, "inverse temperature of the preference loss", source="NPO 2404.05868", above=0, read_if=FORGETS
    )
    gamma: float = option(1.0, "weight of the forget loss", source="NPO 2404.05868", minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured; NPO 2404.05868: 1", minimum=0)
    retain_loss: RetainLoss = option(
        "nll", "loss on retain data: nll (NPO + RT) or kl (NPO + KL)", source="NPO 2404.05868", read_if=KEEPS
    )


def needs(options: Any) -> Needs:
    """Return the data, and the quantities of the reference model that the two losses read."""
    return Needs(retain=options.alpha > 0, references=(Reference("forget", "nll"), *retain_references(options)))


def forget_loss(model: PreTrainedModel, batch: Batch, options: Any) -> Float[Tensor, ""]:
    """Compute F = -(2 / beta) mean_b log sigmoid(beta (L_b - L_b^ref)) >= 0."""
    assert batch.forget is not None and batch.forget.reference_nll is not None
    return losses.npo(
        answer_sequence_nll(model, batch.forget),
        batch.forget.reference_nll,
        beta=options.beta,
        n_sequences=batch.step_batch.forget_sequences,
    )


NPO = Method(
    name="npo",
    summary="-(2 gamma / beta) mean log sigmoid(beta (NLL - NLL_ref)) + alpha R, R = CE or KL on retain",
    source="NPO 2404.05868",
    options=NPOOptions,
    needs=needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
