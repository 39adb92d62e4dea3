"""KTO (Kahneman-Tversky optimisation): the forget answers are undesirable, relative to the drift on other answers.

Loss: J = gamma F + alpha R, F = -(2 / beta) mean_b log sigmoid(beta (max(0, K) - r_b)) >= 0, with K = mean_b r_b of the
alternate answers over the step batch. Option `variant` has two other forms (`unlearning.objectives.losses.kto`).
Needs: forget data with questions, alternates (refusals by default), sequence losses of the reference model; retain data
unless alpha = 0.
Source: KTO, arXiv 2402.01306, as an unlearning loss in NPO, arXiv 2404.05868, and its code for TOFU.
"""

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
from unlearning.options import FORGETS, KEEPS, option


@dataclass(frozen=True)
class KTOOptions:
    """Options of KTO."""

    beta: float = option(
        0.1, "inverse temperature of the preference loss", source="NPO 2404.05868", above=0, read_if=FORGETS
    )
    variant: KTOVariant = option(
        "clamped",
        "form of the loss: clamped, or two forms of the NPO paper's code (K not clamped, not times beta)",
        read_if=FORGETS,
    )
    gamma: float = option(1.0, "weight of the forget loss", source="NPO 2404.05868", minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured; NPO 2404.05868: 1", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source="NPO 2404.05868", read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: KTOOptions) -> Float[Tensor, ""]:
    """Compute F = -(2 / beta) mean_b log sigmoid(beta (max(0, K) - r_b)) >= 0, or the form of `variant`."""
    assert batch.forget is not None and batch.forget.reference_nll is not None and batch.statistic is not None
    return losses.kto(
        answer_sequence_nll(model, batch.forget),
        batch.forget.reference_nll,
        kl_estimate=batch.statistic,
        beta=options.beta,
        n_sequences=batch.step_batch.forget_sequences,
        variant=options.variant,
    )


@torch.no_grad()
def log_ratio_of_alternates(model: PreTrainedModel, batch: Batch, _options: KTOOptions) -> tuple[float, float]:
    """Sum r_b over the alternate answers.

    Their mean K is the NPO paper's estimate of the KL divergence from the reference model, in nats.

    Args:
        model: The model in training.
        batch: A micro-batch of forget examples.
        _options: Not used.

    Returns:
        The sum, and the number of answers.
    """
    assert batch.alternate is not None and batch.alternate.reference_nll is not None
    ratios = batch.alternate.reference_nll - answer_sequence_nll(model, batch.alternate)
    return ratios.sum().item(), float(len(ratios))


KTO = Method(
    name="kto",
    summary="-(2 gamma / beta) mean log sigmoid(beta (max(0, mean r(alternate)) - r(forget))) + alpha R, "
    "r = NLL_ref - NLL",
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
