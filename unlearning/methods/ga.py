"""GA (gradient ascent): raise the loss on the forget set. Unbounded: stop before the model is unusable.

Loss: J = -CE(forget) <= 0, unbounded below.
Needs: forget data.
Source: TOFU, arXiv 2401.06121.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import forget_cross_entropy


@dataclass(frozen=True)
class GAOptions:
    """No options."""


def forget_loss(model: PreTrainedModel, batch: Batch, _options: GAOptions) -> Float[Tensor, ""]:
    """Compute F = -CE(forget) <= 0, unbounded below."""
    return -forget_cross_entropy(model, batch)


GA = Method(
    name="ga",
    summary="-CE(forget)",
    source="TOFU 2401.06121",
    options=GAOptions,
    needs=lambda _options: Needs(),
    needs_note="forget",
    forget_loss=forget_loss,
)
