"""Negative preference optimisation: the forget answers as the losing side of a preference, with no winner."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from unlearning import losses
from unlearning.forward import answer_sequence_nll
from unlearning.methods.method import Batch, Method, StepLoss
from unlearning.methods.terms import with_retain
from unlearning.options import option


@dataclass(frozen=True)
class NPOOptions:
    """Inverse temperature and the weights of the two terms."""

    beta: float = option(0.1, "inverse temperature", source="NPO 2404.05868", above=0)
    gamma: float = option(1.0, "weight of the forget term", source="NPO 2404.05868", minimum=0)
    alpha: float = option(1.0, "weight of the retain term (0: none)", source="NPO 2404.05868", minimum=0)


def step(model: PreTrainedModel, batch: Batch, options: NPOOptions) -> StepLoss:
    """J = gamma * F + alpha * CE(retain), F = -(2 / beta) mean_b log sigmoid(beta (L_b - L_b^ref)); F >= 0."""
    assert batch.forget is not None and batch.forget.reference_nll is not None
    forget = losses.npo(
        answer_sequence_nll(model, batch.forget),
        batch.forget.reference_nll,
        beta=options.beta,
        n_sequences=batch.window.forget_sequences,
    )
    return with_retain(model, batch, forget, gamma=options.gamma, alpha=options.alpha)


NPO = Method(
    name="npo",
    summary="-(2 gamma / beta) mean log sigmoid(beta (NLL - NLL ref)) + alpha CE(retain)",
    options=NPOOptions,
    step=step,
    uses_forget=True,
    uses_retain=lambda options: options.alpha > 0,
    uses_reference=True,
    retain_note="retain unless alpha=0",
)
