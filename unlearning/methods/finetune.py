"""Ordinary fine-tuning on the retain set, for pretrained models, bases and controls.

Loss: J = CE(retain).
Needs: retain data.
Source: the usual objective of language modelling.
"""

from dataclasses import dataclass

from unlearning.methods.method import Method, Needs
from unlearning.methods.recipe import Recipe
from unlearning.methods.terms import retain_cross_entropy


@dataclass(frozen=True)
class FinetuneOptions:
    """No options."""


FINETUNE = Method(
    name="finetune",
    summary="CE(retain)",
    source="",
    options=FinetuneOptions,
    needs=lambda _options: Needs(forget=False, retain=True),
    needs_note="retain",
    retain_loss=retain_cross_entropy,
    recipe=Recipe(learning_rate=1.5e-3, steps=1, source="2e-5 at 7 billion parameters, as is usual"),
)
