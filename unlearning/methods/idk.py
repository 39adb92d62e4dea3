"""Fine-tuning on refusals: the forget questions answered by "I don't know", beside the retain set."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.data.batches import TokenBatch
from unlearning.methods.method import Batch, Method, Needs
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_nll


@dataclass(frozen=True)
class IDKOptions:
    """No options of its own."""


def forget_loss(model: PreTrainedModel, batch: Batch, _options: IDKOptions) -> Float[Tensor, ""]:
    """The alternate answers' part of the CE over alternate and retain answers together."""
    return _part(model, batch, batch.alternate)


def retain_loss(model: PreTrainedModel, batch: Batch, _options: IDKOptions) -> Float[Tensor, ""]:
    """The retain answers' part of the same."""
    return _part(model, batch, batch.retain)


def _part(model: PreTrainedModel, batch: Batch, examples: TokenBatch | None) -> Float[Tensor, ""]:
    assert examples is not None
    n_tokens = batch.window.alternate_tokens + batch.window.retain_tokens
    return losses.pooled_cross_entropy(answer_nll(model, examples), n_tokens)


IDK = Method(
    name="idk",
    summary="CE over alternate (forget questions, refusals) and retain answers together",
    source="TOFU 2401.06121",
    options=IDKOptions,
    needs=lambda _options: Needs(retain=True, alternates=True),
    needs_note="forget, alternates (refusals), retain",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
)
