"""WGA (weighted gradient ascent): tokens that are already forgotten lose their weight.

Loss: J = gamma F + alpha R, F = mean_t sg(p_t^beta) log p_t <= 0, p_t the probability of token y_t.
Needs: forget data; retain data unless alpha = 0; logits of the reference model if retain_loss is kl.
Source: Rethinking LLM Unlearning Objectives (WGA), arXiv 2502.19301.
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
class WGAOptions:
    """Options of WGA."""

    beta: float = option(
        1.0, "power of p in the weight of a token (0: grad_diff)", source="WGA 2502.19301", minimum=0, read_if=FORGETS
    )
    gamma: float = option(1.0, "weight of the forget loss", source="open-unlearning", minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source="open-unlearning", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source="open-unlearning", read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: WGAOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t sg(p_t^beta) log p_t <= 0."""
    assert batch.forget is not None
    return losses.wga(answer_nll(model, batch.forget), beta=options.beta, n_tokens=batch.step_batch.forget_tokens)


WGA = Method(
    name="wga",
    summary="gamma mean sg(p^beta) log p on forget + alpha R, R = CE or KL on retain",
    source="WGA 2502.19301",
    options=WGAOptions,
    needs=lambda options: Needs(retain=options.alpha > 0, references=retain_references(options)),
    needs_note="forget, retain unless alpha=0, reference if retain_loss=kl",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
