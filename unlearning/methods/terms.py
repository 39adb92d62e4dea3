"""Terms that several methods share."""

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.forward import answer_nll
from unlearning.losses import pooled_cross_entropy
from unlearning.methods.method import Batch, StepLoss


def forget_cross_entropy(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """CE of the forget answers, pooled over the tokens of the accumulation window."""
    assert batch.forget is not None  # the trainer refuses a method without the data that it declares
    return pooled_cross_entropy(answer_nll(model, batch.forget), batch.window.forget_tokens)


def retain_cross_entropy(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """CE of the retain answers, pooled over the tokens of the accumulation window."""
    assert batch.retain is not None
    return pooled_cross_entropy(answer_nll(model, batch.retain), batch.window.retain_tokens)


def with_retain(
    model: PreTrainedModel, batch: Batch, forget: Float[Tensor, ""], *, gamma: float, alpha: float
) -> StepLoss:
    """J = gamma * forget + alpha * CE(retain); without the retain term where alpha is 0."""
    if not alpha:
        return StepLoss(total=gamma * forget, forget=forget)
    retain = retain_cross_entropy(model, batch)
    return StepLoss(total=gamma * forget + alpha * retain, forget=forget, retain=retain)
