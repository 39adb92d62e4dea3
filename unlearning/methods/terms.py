"""Losses that several methods share, as a method's `forget_loss` or `retain_loss`."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Reference
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_divergence, answer_nll, answer_sequence_nll

RetainLoss = Literal["nll", "kl"]
"""What keeps the retain set: its cross-entropy, or the divergence from the start model there."""


def forget_cross_entropy(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """CE of the forget answers, pooled over the tokens of the window."""
    assert batch.forget is not None  # the trainer refuses a method without the data that it declares
    return losses.pooled_cross_entropy(answer_nll(model, batch.forget), batch.window.forget_tokens)


def preference(model: PreTrainedModel, batch: Batch, *, beta: float) -> Float[Tensor, ""]:
    """DPO with the alternate answers as winners over the forget answers."""
    forget, alternate = batch.forget, batch.alternate
    assert forget is not None and forget.reference_nll is not None
    assert alternate is not None and alternate.reference_nll is not None
    return losses.dpo(
        answer_sequence_nll(model, alternate),
        alternate.reference_nll,
        answer_sequence_nll(model, forget),
        forget.reference_nll,
        beta=beta,
        n_sequences=batch.window.forget_sequences,
    )


PREFERENCE_REFERENCES = (Reference("forget", "nll"), Reference("alternate", "nll"))
"""What `preference` reads of the start model."""


def retain_cross_entropy(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """CE of the retain answers, pooled over the tokens of the window."""
    assert batch.retain is not None
    return losses.pooled_cross_entropy(answer_nll(model, batch.retain), batch.window.retain_tokens)


def retain_divergence(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """KL(start model || model) at the retain answers, mean over the tokens of the window."""
    assert batch.retain is not None
    return answer_divergence(model, batch.retain).sum() / batch.window.retain_tokens


def retain_term(model: PreTrainedModel, batch: Batch, options: Any) -> Float[Tensor, ""]:
    """The retain loss that the option `retain_loss` names."""
    return retain_divergence(model, batch) if options.retain_loss == "kl" else retain_cross_entropy(model, batch)


def retain_references(options: Any) -> tuple[Reference, ...]:
    """What `retain_term` reads of the start model; nothing where the retain loss has no weight."""
    if options.retain_loss == "kl" and getattr(options, "alpha", 1):
        return (Reference("retain", "logits"),)
    return ()
