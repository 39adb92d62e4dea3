"""Gradient difference: raise the loss on the forget set, lower it on the retain set.

Loss: J = -gamma CE(forget) + alpha R, unbounded below.
Needs: forget data; retain data unless alpha = 0; logits of the reference model if retain_loss is kl.
Source: TOFU, arXiv 2401.06121.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import RetainLoss, forget_cross_entropy, retain_references, retain_term
from unlearning.options import KEEPS, option


@dataclass(frozen=True)
class GradDiffOptions:
    """Options of gradient difference."""

    gamma: float = option(1.0, "weight of the forget loss", source="TOFU 2401.06121", minimum=0)
    alpha: float = option(5.0, "weight of the retain loss (0: none)", source="measured; TOFU 2401.06121: 1", minimum=0)
    retain_loss: RetainLoss = option(
        "nll", "loss on retain data: nll or kl (GA + KL)", source="TOFU 2401.06121", read_if=KEEPS
    )


def forget_loss(model: PreTrainedModel, batch: Batch, _options: GradDiffOptions) -> Float[Tensor, ""]:
    """Compute F = -CE(forget) <= 0, unbounded below."""
    return -forget_cross_entropy(model, batch)


GRAD_DIFF = Method(
    name="grad_diff",
    summary="-gamma CE(forget) + alpha R, R = CE(retain) or KL(reference || model) on retain",
    source="TOFU 2401.06121",
    options=GradDiffOptions,
    needs=lambda options: Needs(retain=options.alpha > 0, references=retain_references(options)),
    needs_note="forget, retain unless alpha=0, reference if retain_loss=kl",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
