"""Kahneman-Tversky optimisation: the forget answers as undesirable, measured from how far other answers have moved."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.objectives.losses import KTOVariant
from unlearning.options import option


@dataclass(frozen=True)
class KTOOptions:
    """Inverse temperature, which form of the loss, the retain loss and the weights of the two losses."""

    beta: float = option(0.1, "inverse temperature", source="NPO 2404.05868", above=0)
    variant: KTOVariant = option(
        "clamped", "clamped, or a form of the NPO paper's code (K not clamped, not times beta)"
    )
    gamma: float = option(1.0, "weight of the forget loss", source="NPO 2404.05868", minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source="NPO 2404.05868", minimum=0)
    retain_loss: RetainLoss = option("nll", "nll or kl", source="NPO 2404.05868")


def forget_loss(model: PreTrainedModel, batch: Batch, options: KTOOptions) -> Float[Tensor, ""]:
    """F = -(2 / beta) mean_b log sigmoid(beta (max(0, K) - r_b)), r = L^ref - L; F >= 0."""
    assert batch.forget is not None and batch.forget.reference_nll is not None and batch.statistic is not None
    return losses.kto(
        answer_sequence_nll(model, batch.forget),
        batch.forget.reference_nll,
        kl_estimate=batch.statistic,
        beta=options.beta,
        n_sequences=batch.window.forget_sequences,
        variant=options.variant,
    )


@torch.no_grad()
def log_ratio_of_alternates(model: PreTrainedModel, batch: Batch, _options: KTOOptions) -> tuple[float, float]:
    """K = mean_b r_b of the alternate answers: the NPO paper's estimate of the KL from the start model, in nats."""
    assert batch.alternate is not None and batch.alternate.reference_nll is not None
    ratios = batch.alternate.reference_nll - answer_sequence_nll(model, batch.alternate)
    return ratios.sum().item(), float(len(ratios))


KTO = Method(
    name="kto",
    summary="-(2 gamma / beta) mean log sigmoid(beta (max(0, mean r(alternate)) - r(forget))) + alpha R, "
    "r = NLL start - NLL",
    source="KTO 2402.01306",
    options=KTOOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        alternates=True,
        references=(Reference("forget", "nll"), Reference("alternate", "nll"), *retain_references(options)),
    ),
    needs_note="forget, alternates, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    statistic=log_ratio_of_alternates,
)
