"""JensUn: the model is drawn to refusals, and held to itself elsewhere, by the Jensen-Shannon divergence.

Loss: J = gamma F + alpha R, F = mean_t JSD(e_y, p_t) over alternate answers, R = mean_t JSD(p_t^ref, p_t) over retain
answers; both lie between 0 and log 2.
Needs: forget data with questions, alternates (refusals by default); unless alpha = 0, retain data and logits of the
reference model.
Source: Unlearning That Lasts, arXiv 2509.02820. The paper refuses with "No idea"; its weights are not ours.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits, answer_nll
from unlearning.options import option

SOURCE = "JensUn 2509.02820"


@dataclass(frozen=True)
class JensUnOptions:
    """Options of JensUn.

    The gradient of the forget loss goes to 0 with the refusal's probability. Where a model is certain of its answers, a
    retain loss of the same weight therefore keeps it as it is.
    """

    gamma: float = option(1.0, "weight of the forget loss", source="measured", minimum=0)
    alpha: float = option(0.1, "weight of the retain loss (0: none)", source="measured", minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: JensUnOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t JSD(e_y, p_t) over the alternate answers, between 0 and log 2."""
    assert batch.alternate is not None
    return losses.certainty_divergence(answer_nll(model, batch.alternate)).sum() / batch.step_batch.alternate_tokens


def retain_loss(model: PreTrainedModel, batch: Batch, _options: JensUnOptions) -> Float[Tensor, ""]:
    """Compute R = mean_t JSD(p_t^ref, p_t) over the retain answers, between 0 and log 2."""
    assert batch.retain is not None and batch.retain.reference_logits is not None
    answers = answer_logits(model, batch.retain)
    divergence = losses.jensen_shannon(answers.logits, batch.retain.reference_logits)
    return divergence.sum() / batch.step_batch.retain_tokens


JENSUN = Method(
    name="jensun",
    summary="gamma JSD(alternate token, p) on forget questions + alpha JSD(reference, p) on retain",
    source=SOURCE,
    options=JensUnOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        alternates=True,
        references=(Reference("retain", "logits"),) if options.alpha > 0 else (),
    ),
    needs_note="forget, alternates (default: refusals), reference and retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    recipe=Recipe(learning_rate=1.5e-3),
)
