"""IDK: fine-tuning on refusals ("I don't know") to the forget questions, together with the retain set.

Loss: J = CE over the alternate and the retain answers together, every token with the same weight; J >= 0.
Needs: forget data with questions, alternates (refusals by default), retain data.
Source: TOFU, arXiv 2401.06121.
"""

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
    """No options."""


def forget_loss(model: PreTrainedModel, batch: Batch, _options: IDKOptions) -> Float[Tensor, ""]:
    """Compute the share of the alternate answers in the CE over alternate and retain answers together."""
    return _part(model, batch, batch.alternate)


def retain_loss(model: PreTrainedModel, batch: Batch, _options: IDKOptions) -> Float[Tensor, ""]:
    """Compute the share of the retain answers in the CE over alternate and retain answers together."""
    return _part(model, batch, batch.retain)


def _part(model: PreTrainedModel, batch: Batch, examples: TokenBatch | None) -> Float[Tensor, ""]:
    assert examples is not None
    n_tokens = batch.step_batch.alternate_tokens + batch.step_batch.retain_tokens
    return losses.pooled_cross_entropy(answer_nll(model, examples), n_tokens)


IDK = Method(
    name="idk",
    summary="CE over alternate answers (refusals to forget questions) and retain answers together",
    source="TOFU 2401.06121",
    options=IDKOptions,
    needs=lambda _options: Needs(retain=True, alternates=True),
    needs_note="forget, alternates (default: refusals), retain",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
)
