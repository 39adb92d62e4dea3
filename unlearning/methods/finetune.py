"""Ordinary fine-tuning on the retain set: trains trunks, bases and models that never saw the forget set."""

from dataclasses import dataclass

from unlearning.methods.method import Method, Needs
from unlearning.methods.terms import retain_cross_entropy


@dataclass(frozen=True)
class FinetuneOptions:
    """No options of its own."""


FINETUNE = Method(
    name="finetune",
    summary="CE(retain)",
    source="",
    options=FinetuneOptions,
    needs=lambda _options: Needs(forget=False, retain=True),
    needs_note="retain",
    retain_loss=retain_cross_entropy,
)
