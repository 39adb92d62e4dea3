"""DPO (direct preference optimisation): an alternate answer, by default a refusal, is preferred to the forget answer.

Loss: J = gamma F + alpha R, F = -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))) >= 0.
Needs: forget data with questions, alternates (refusals by default), sequence losses of the reference model; retain data
unless alpha = 0.
Source: Direct Preference Optimization, arXiv 2305.18290, equation 7, times 2 / beta as in NPO, arXiv 2404.05868.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import PREFERENCE_REFERENCES, RetainLoss, preference, retain_references, retain_term
from unlearning.options import FORGETS, KEEPS, option


@dataclass(frozen=True)
class DPOOptions:
    """Options of DPO."""

    beta: float = option(
        0.01,
        "inverse temperature of the preference loss",
        source="measured; NPO 2404.05868: 0.1",
        above=0,
        read_if=FORGETS,
    )
    gamma: float = option(1.0, "weight of the forget loss", source="NPO 2404.05868", minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured; NPO 2404.05868: 1", minimum=0)
    retain_loss: RetainLoss = option(
        "nll", "loss on retain data: nll (DPO + RT) or kl (DPO + KL)", source="NPO 2404.05868", read_if=KEEPS
    )


def forget_loss(model: PreTrainedModel, batch: Batch, options: DPOOptions) -> Float[Tensor, ""]:
    """Compute F = -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))) >= 0."""
    return preference(model, batch, beta=options.beta)


DPO = Method(
    name="dpo",
    summary="-(2 gamma / beta) mean log sigmoid(beta (r(alternate) - r(forget))) + alpha R, r = NLL_ref - NLL",
    source="DPO 2305.18290",
    options=DPOOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        alternates=True,
        references=(*PREFERENCE_REFERENCES, *retain_references(options)),
    ),
    needs_note="forget, alternates, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
