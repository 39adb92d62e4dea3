"""Ordinary fine-tuning on the retain set: trains trunks, bases and models that never saw the forget set."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, StepLoss
from unlearning.methods.terms import retain_cross_entropy


@dataclass(frozen=True)
class FinetuneOptions:
    """No options of its own."""


def step(model: PreTrainedModel, batch: Batch, _options: FinetuneOptions) -> StepLoss:
    """J = CE(retain)."""
    loss = retain_cross_entropy(model, batch)
    return StepLoss(total=loss, retain=loss)


FINETUNE = Method(
    name="finetune",
    summary="CE(retain)",
    options=FinetuneOptions,
    step=step,
    uses_forget=False,
    uses_retain=lambda _options: True,
)
