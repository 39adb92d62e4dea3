"""A forward pass that returns logits at the answer positions only."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.data.batches import TokenBatch, collate
from unlearning.data.spans import AnswerSpan
from unlearning.losses import sequence_nll, token_nll


@dataclass(frozen=True)
class AnswerLogits:
    """The answer tokens of a batch as one flat list.

    Attributes:
        logits: what predicts each answer token.
        targets: the answer tokens.
        sequence: which sequence of the batch each token belongs to.
    """

    logits: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    sequence: Int[Tensor, " token"]


def answer_logits(model: PreTrainedModel, batch: TokenBatch) -> AnswerLogits:
    """Run the model and keep the logits that predict answer tokens.

    The output projection runs only at positions where some sequence of the batch predicts an answer token: over a
    large vocabulary the rest of the logits would be most of the memory.
    """
    mask = batch.predicts_answer
    positions = mask.any(dim=0).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=positions,
        ).logits
    else:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = output.logits[:, positions]
    kept = mask[:, positions]
    return AnswerLogits(
        logits=logits[kept],
        targets=batch.input_ids[:, positions + 1][kept],
        sequence=kept.nonzero()[:, 0],
    )


def answer_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Negative log-likelihood of every answer token of the batch, in nats, as one flat list."""
    answers = answer_logits(model, batch)
    return token_nll(answers.logits, answers.targets)


def answer_sequence_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each answer, summed over its tokens, in nats."""
    answers = answer_logits(model, batch)
    return sequence_nll(token_nll(answers.logits, answers.targets), answers.sequence, batch.n_sequences)


def reference_nll(model: PreTrainedModel, spans: Sequence[AnswerSpan], *, batch_size: int) -> Float[Tensor, " example"]:
    """The column of reference constants: each answer's summed negative log-likelihood, on the CPU.

    Computed without dropout, before the first step, from the very model that is then trained: no copy is kept.
    """
    was_training = model.training
    model.eval()
    columns = []
    with torch.no_grad():
        for first in range(0, len(spans), batch_size):
            batch = collate(spans[first : first + batch_size]).to(model.device)
            columns.append(answer_sequence_nll(model, batch).cpu())
    model.train(was_training)
    return torch.cat(columns)
