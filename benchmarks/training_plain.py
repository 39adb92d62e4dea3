"""The straightforward trainer: a second model in memory that runs at every step, logits everywhere, padded as it comes.

As public unlearning code does it, with PyTorch's and transformers' public functions and nothing of the toolkit. Without
the mistakes of that code, too, so that its losses are the toolkit's: they are masked, and normalised by the step.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.training_case import Row, TrainingCase
from benchmarks.training_options import BETA, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Method

IGNORED = -100


@dataclass(frozen=True)
class Padded:
    """A micro-batch, [batch, position]; labels are IGNORED on prompts and padding."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pad(rows: Sequence[Row], device: torch.device) -> Padded:
    """Pad on the right to the longest row."""
    ids = [torch.tensor(row.prompt + row.answer) for row in rows]
    labels = [torch.tensor([IGNORED] * len(row.prompt) + row.answer) for row in rows]
    return Padded(
        input_ids=pad_sequence(ids, batch_first=True).to(device),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
    )


def logits_of(model: PreTrainedModel, batch: Padded) -> Tensor:
    """Compute logits at every position but the last."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits[:, :-1].float()


def token_nll(logits: Tensor, batch: Padded) -> Tensor:
    """Compute the loss of each token, [batch, position]; 0 where there is no label."""
    labels = batch.labels[:, 1:]
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


def npo(model: PreTrainedModel, reference: PreTrainedModel, batch: Padded) -> Tensor:
    """Compute the sum over sequences of -(2 / beta) log sigmoid(beta (L - L_ref))."""
    nll = token_nll(logits_of(model, batch), batch).sum(dim=1)
    with torch.no_grad():
        of_reference = token_nll(logits_of(reference, batch), batch).sum(dim=1)
    return -(2 / BETA) * F.logsigmoid(BETA * (nll - of_reference)).sum()


def divergence(model: PreTrainedModel, reference: PreTrainedModel, batch: Padded) -> Tensor:
    """Compute the sum over answer tokens of KL(reference || model)."""
    with torch.no_grad():
        of_reference = logits_of(reference, batch).log_softmax(-1)
    of_model = logits_of(model, batch).log_softmax(-1)
    per_token = F.kl_div(of_model, of_reference, reduction="none", log_target=True).sum(-1)
    return (per_token * (batch.labels[:, 1:] != IGNORED)).sum()


def train_plain(case: TrainingCase, method: Method) -> list[float]:
    """Train a fresh model for the case's steps; the loss of every step."""
    model = case.build_model().train()
    reference = copy.deepcopy(model).eval() if method.second_model else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    losses = []
    for forget, retain in case.step_batches(uses_forget=method.uses_forget):
        step = _bilevel_step if method.bilevel else _step
        losses.append(step(model, reference, method, case, forget, retain))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _step(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    method: Method,
    case: TrainingCase,
    forget: list[Row],
    retain: list[Row],
) -> float:
    """Add up both losses of each micro-batch, and run one backward pass through the sum."""
    total = 0.0
    for first in range(0, len(retain), case.shape.batch):
        rows = slice(first, first + case.shape.batch)
        loss = _retain_share(model, reference, method, pad(retain[rows], case.device), retain)
        if method.uses_forget:
            loss = loss + _forget_share(model, reference, method, pad(forget[rows], case.device), forget)
        loss.backward()
        total += loss.item()
    return total


def _bilevel_step(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    method: Method,
    case: TrainingCase,
    forget: list[Row],
    retain: list[Row],
) -> float:
    """Compute the gradients of the two losses separately, flatten them, and project the retain gradient (gamma 1)."""
    total = 0.0
    flat = []
    for data, share in ((forget, _forget_share), (retain, _retain_share)):
        model.zero_grad()
        for first in range(0, len(data), case.shape.batch):
            loss = share(model, reference, method, pad(data[first : first + case.shape.batch], case.device), data)
            loss.backward()
            total += loss.item()
        flat.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    f, r = flat
    combined = r + (1 - r @ f / (f @ f)) * f
    for weight, gradient in zip(
        model.parameters(), combined.split([weight.numel() for weight in model.parameters()]), strict=True
    ):
        weight.grad = gradient.view_as(weight)
    return total


def _forget_share(
    model: PreTrainedModel, reference: PreTrainedModel | None, method: Method, batch: Padded, step_batch: list[Row]
) -> Tensor:
    if method.preference:
        assert reference is not None
        return npo(model, reference, batch) / len(step_batch)
    return -token_nll(logits_of(model, batch), batch).sum() / _answer_tokens(step_batch)


def _retain_share(
    model: PreTrainedModel, reference: PreTrainedModel | None, method: Method, batch: Padded, step_batch: list[Row]
) -> Tensor:
    if method.divergence:
        assert reference is not None
        return divergence(model, reference, batch) / _answer_tokens(step_batch)
    return token_nll(logits_of(model, batch), batch).sum() / _answer_tokens(step_batch)


def _answer_tokens(step_batch: list[Row]) -> int:
    return sum(len(row.answer) for row in step_batch)
