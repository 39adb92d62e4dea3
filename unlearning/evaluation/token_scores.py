"""Scores of every token of an answer, teacher-forced.

Probabilities, truth ratios, memorisation scores and membership attacks are computed from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unlearning.common.context import why_no_longer
from unlearning.common.errors import InputError
from unlearning.data.batches import collate
from unlearning.data.chat import ChatFormat
from unlearning.data.spans import AnswerSpan, encode_answer
from unlearning.evaluation.subject import Subject
from unlearning.objectives.forward import answer_logits

_AT_ONCE = 2**24
"""Number of logits whose log-softmax is in memory at a time: 512 tokens of a vocabulary of 32768."""


@dataclass(frozen=True)
class Target:
    """A text whose tokens are scored.

    Attributes:
        span: Prompt and answer as tokens.
        n_closing: Number of tokens at the end that close the answer (end of sequence, or end of a chat's turn) and are
            not part of its text.
    """

    span: AnswerSpan
    n_closing: int


@dataclass(frozen=True)
class TokenScores:
    """Scores of one answer's tokens, in float64 of a float32 log-softmax; with moments, of a float64 one.

    Attributes:
        log_probs: log p(y_t | prompt, y_<t), in nats.
        is_likeliest: Whether y_t is the token of the highest probability.
        mean_log_prob: Sum over the vocabulary of p log p (minus the entropy), in nats; None unless asked for.
        var_log_prob: Sum over the vocabulary of p (log p - mean)^2, in nats squared; None unless asked for.
        n_closing: Number of tokens at the end that close the answer.
    """

    log_probs: Float[np.ndarray, " token"]
    is_likeliest: Bool[np.ndarray, " token"]
    mean_log_prob: Float[np.ndarray, " token"] | None
    var_log_prob: Float[np.ndarray, " token"] | None
    n_closing: int

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood over all tokens, including those that close the answer, in nats."""
        return -float(self.log_probs.mean())

    def without_closing(self) -> "TokenScores":
        """Return the scores of the answer's text, without the tokens that close it."""
        end = len(self.log_probs) - self.n_closing
        parts = (self.log_probs, self.is_likeliest, self.mean_log_prob, self.var_log_prob)
        log_probs, is_likeliest, mean, var = (None if part is None else part[:end] for part in parts)
        assert log_probs is not None and is_likeliest is not None
        return TokenScores(log_probs, is_likeliest, mean, var, 0)


def encode_target(
    subject: Subject,
    prompt: str,
    answer: str,
    *,
    chat: ChatFormat | None = None,
    append_eos: bool = True,
) -> Target:
    """Tokenise a prompt and its answer as training does (`unlearning.data.spans`).

    A tokenizer without an end-of-sequence token appends none.

    Args:
        subject: The model, with its tokenizer.
        prompt: Wrapped prompt; empty for plain text.
        answer: Text that is scored.
        chat: Chat format of the prompt, if it has one.
        append_eos: End the answer with the end-of-sequence token, or with the tokens that end a chat's turn.

    Returns:
        The tokens, and which of them close the answer.

    Raises:
        InputError: The answer is empty, or prompt and answer do not fit into the model's context.
    """
    span = encode_answer(subject.tokenizer, prompt, answer, chat=chat, append_eos=append_eos)
    limit = subject.context
    if limit is not None and len(span.input_ids) > limit:
        raise InputError(
            f"{(prompt or answer)[:60]!r} has {len(span.input_ids)} tokens with its answer, more than the model's "
            f"context of {limit}{why_no_longer(subject.model)}. Shorten it, or leave it out."
        )
    return Target(span, span.n_closing)


@torch.no_grad()
def score_tokens(
    subject: Subject,
    targets: Sequence[Target],
    *,
    batch_size: int,
    moments: bool = False,
    advance: Callable[[int], None] = lambda _n: None,
) -> list[TokenScores]:
    """Score every answer token of every target; targets of similar length run together.

    A text without a prompt is scored from its second token on: nothing predicts the first.

    Args:
        subject: The model.
        targets: Texts to score.
        batch_size: Number of texts at a time; no number depends on it.
        moments: Also compute mean and variance of log p over the vocabulary.
        advance: Called with the number of targets that have just been scored.

    Returns:
        Scores of each target, in the order of the targets.

    Raises:
        InputError: The model has no embedding for a token, or its log-probabilities are not finite.
    """
    subject.check_tokens([target.span.input_ids for target in targets])
    order = sorted(range(len(targets)), key=lambda place: len(targets[place].span.input_ids))
    found: dict[int, TokenScores] = {}
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = collate([targets[place].span for place in places]).to(subject.model.device)
        answers = answer_logits(subject.model, batch)
        columns = _token_columns(answers.logits, answers.targets, moments=moments)
        if not np.isfinite(columns[0]).all():
            raise InputError(f"{subject.name}: the log-probabilities must be finite. Evaluate the model in float32.")
        sequence = answers.sequence.cpu().numpy()
        for row, place in enumerate(places):
            mine = sequence == row
            log_probs, likeliest, *rest = (column[mine] for column in columns)
            mean, var = rest if moments else (None, None)
            found[place] = TokenScores(log_probs, likeliest.astype(bool), mean, var, targets[place].n_closing)
        advance(len(places))
    return [found[place] for place in range(len(targets))]


def log_prob_moments(log_p: Float[Tensor, "token vocab"]) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Compute mean and variance of log p under p at each token.

    The variance is summed from deviations: of a flat distribution it is far below the square of the mean, and the
    difference of two sums of squares would be rounding alone.

    Args:
        log_p: Log-probabilities over the vocabulary, in nats; float64 where the distribution may be flat.

    Returns:
        Sum of p log p, and sum of p (log p - mean)^2; impossible tokens (log p = -inf) add nothing.
    """
    p = log_p.exp()
    log_p = torch.where(p > 0, log_p, 0.0)  # 0 * -inf for an impossible token
    mean = (p * log_p).sum(dim=-1, keepdim=True)
    return mean[:, 0], (p * (log_p - mean) ** 2).sum(dim=-1)


def _token_columns(logits: Tensor, targets: Tensor, *, moments: bool) -> list[np.ndarray]:
    """Return per token: log-probability, whether it is the likeliest, and mean and variance of log p if asked for."""
    columns: list[list[Tensor]] = [[] for _ in range(4 if moments else 2)]
    at_once = max(1, _AT_ONCE // logits.shape[-1] // (2 if moments else 1))  # float64 takes twice the memory
    for some, wanted in zip(logits.split(at_once), targets.split(at_once), strict=True):
        log_p = (some.double() if moments else some.float()).log_softmax(dim=-1)
        found = [log_p.gather(1, wanted[:, None])[:, 0], log_p.argmax(dim=-1) == wanted]
        for column, values in zip(columns, [*found, *(log_prob_moments(log_p) if moments else ())], strict=True):
            column.append(values)
    return [torch.cat(column).double().cpu().numpy() for column in columns]
