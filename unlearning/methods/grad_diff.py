"""Gradient difference: ascend on the forget set, descend on the retain set."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, StepLoss
from unlearning.methods.terms import forget_cross_entropy, with_retain
from unlearning.options import option


@dataclass(frozen=True)
class GradDiffOptions:
    """Weights of the two terms."""

    gamma: float = option(1.0, "weight of the forget term", source="TOFU 2401.06121", minimum=0)
    alpha: float = option(
        1.0, "weight of the retain term (0: plain gradient ascent)", source="TOFU 2401.06121", minimum=0
    )


def step(model: PreTrainedModel, batch: Batch, options: GradDiffOptions) -> StepLoss:
    """J = -gamma * CE(forget) + alpha * CE(retain); unbounded below."""
    forget = -forget_cross_entropy(model, batch)
    return with_retain(model, batch, forget, gamma=options.gamma, alpha=options.alpha)


GRAD_DIFF = Method(
    name="grad_diff",
    summary="-gamma CE(forget) + alpha CE(retain)",
    options=GradDiffOptions,
    step=step,
    uses_forget=True,
    uses_retain=lambda options: options.alpha > 0,
    retain_note="retain unless alpha=0",
)
