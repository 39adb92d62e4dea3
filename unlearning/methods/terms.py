"""Losses that several methods share."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Reference
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_divergence, answer_logits, answer_nll, answer_sequence_nll

RetainLoss = Literal["nll", "kl"]
"""Loss on the retain set: cross-entropy ("nll") or KL(reference || model) ("kl")."""


def forget_cross_entropy(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """Compute CE(forget), the mean over all forget answer tokens of the step batch."""
    assert batch.forget is not None  # training does not start without the data that a method declares
    return losses.pooled_cross_entropy(answer_nll(model, batch.forget), batch.step_batch.forget_tokens)


def negative_entropy(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """Compute -mean_t H(p_t) >= -log V over all forget answer tokens of the step batch, in nats."""
    assert batch.forget is not None
    logits = answer_logits(model, batch.forget).logits
    log_p = (logits if logits.dtype.itemsize > 4 else logits.float()).log_softmax(-1)
    return (log_p.exp() * log_p).sum() / batch.step_batch.forget_tokens


def preference(model: PreTrainedModel, batch: Batch, *, beta: float) -> Float[Tensor, ""]:
    """Compute the DPO loss, with the alternate answers preferred to the forget answers.

    Args:
        model: The model in training.
        batch: A micro-batch with forget and alternate answers.
        beta: Inverse temperature.

    Returns:
        The micro-batch's share of -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))).
    """
    forget, alternate = batch.forget, batch.alternate
    assert forget is not None and forget.reference_nll is not None
    assert alternate is not None and alternate.reference_nll is not None
    return losses.dpo(
        answer_sequence_nll(model, alternate),
        alternate.reference_nll,
        answer_sequence_nll(model, forget),
        forget.reference_nll,
        beta=beta,
        n_sequences=batch.step_batch.forget_sequences,
    )


PREFERENCE_REFERENCES = (Reference("forget", "nll"), Reference("alternate", "nll"))
"""Quantities of the reference model that `preference` reads."""


def retain_cross_entropy(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """Compute CE(retain), the mean over all retain answer tokens of the step batch."""
    assert batch.retain is not None
    return losses.pooled_cross_entropy(answer_nll(model, batch.retain), batch.step_batch.retain_tokens)


def forget_divergence(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """Compute KL(reference || model), the mean over all forget answer tokens of the step batch, in nats."""
    assert batch.forget is not None
    return answer_divergence(model, batch.forget).sum() / batch.step_batch.forget_tokens


def retain_divergence(model: PreTrainedModel, batch: Batch, _options: Any = None) -> Float[Tensor, ""]:
    """Compute KL(reference || model), the mean over all retain answer tokens of the step batch, in nats."""
    assert batch.retain is not None
    return answer_divergence(model, batch.retain).sum() / batch.step_batch.retain_tokens


def retain_term(model: PreTrainedModel, batch: Batch, options: Any) -> Float[Tensor, ""]:
    """Compute the retain loss that the option `retain_loss` names."""
    return retain_divergence(model, batch) if options.retain_loss == "kl" else retain_cross_entropy(model, batch)


def retain_references(options: Any) -> tuple[Reference, ...]:
    """Return the quantities of the reference model that `retain_term` reads; none if alpha is 0."""
    if options.retain_loss == "kl" and getattr(options, "alpha", 1):
        return (Reference("retain", "logits"),)
    return ()
