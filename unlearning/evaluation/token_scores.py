"""What a model says of every token of an answer, teacher-forced: what probabilities, truth ratios, memorisation scores
and membership attacks are all made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unlearning.common.errors import InputError
from unlearning.data.batches import collate
from unlearning.data.chat import ChatFormat
from unlearning.data.spans import AnswerSpan, encode_answer
from unlearning.evaluation.subject import Subject
from unlearning.objectives.forward import answer_logits

_AT_ONCE = 512
"""Tokens whose log-softmax is in memory together."""


@dataclass(frozen=True)
class Target:
    """A text whose tokens are scored.

    Attributes:
        span: prompt and answer as tokens.
        n_closing: how many tokens at the end close the answer (end of sequence, or the end of a chat's turn) and are
            no part of its text.
    """

    span: AnswerSpan
    n_closing: int


@dataclass(frozen=True)
class TokenScores:
    """One answer, token by token; all in float64 of a float32 log-softmax.

    Attributes:
        log_probs: log p(y_t | prompt, y_<t), in nats.
        is_likeliest: whether y_t is the token of the highest probability.
        mean_log_prob: sum over the vocabulary of p log p (minus the entropy), where it was asked for.
        var_log_prob: sum of p (log p)^2 minus the square of the mean, likewise.
        n_closing: how many tokens at the end close the answer.
    """

    log_probs: Float[np.ndarray, " token"]
    is_likeliest: Bool[np.ndarray, " token"]
    mean_log_prob: Float[np.ndarray, " token"] | None
    var_log_prob: Float[np.ndarray, " token"] | None
    n_closing: int

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood over all tokens, with those that close the answer, in nats."""
        return -float(self.log_probs.mean())

    def without_closing(self) -> "TokenScores":
        """The answer's text alone."""
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
        subject: whose tokenizer it is.
        prompt: wrapped already; empty for plain text.
        answer: what is scored.
        chat: whose prompt this is, where it is one.
        append_eos: end the answer with the end-of-sequence token, or with what ends a chat's turns.

    Raises:
        InputError: the answer is empty, or text and answer do not fit into the model's context.
    """
    bare = encode_answer(subject.tokenizer, prompt, answer, chat=chat)
    span = encode_answer(subject.tokenizer, prompt, answer, chat=chat, append_eos=True) if append_eos else bare
    limit = subject.context
    if limit is not None and len(span.input_ids) > limit:
        raise InputError(
            f"{(prompt or answer)[:60]!r} has {len(span.input_ids)} tokens with its answer, the model's context "
            f"{limit}; shorten it, or leave it out"
        )
    return Target(span, n_closing=len(span.input_ids) - len(bare.input_ids))


@torch.no_grad()
def score_tokens(
    subject: Subject,
    targets: Sequence[Target],
    *,
    batch_size: int,
    moments: bool = False,
    advance: Callable[[int], None] = lambda _n: None,
) -> list[TokenScores]:
    """Score every answer token of every target, in the targets' order; those of similar length run together.

    A text without a prompt is scored from its second token on: nothing predicts the first.

    Args:
        subject: the model.
        targets: what to score.
        batch_size: texts at a time; no number depends on it.
        moments: also mean and variance of log p over the vocabulary.
        advance: called with the number of targets that have just been scored.

    Raises:
        InputError: a token that the model has no embedding for, or logits that are not finite.
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
            raise InputError(f"{subject.name}: gives log-probabilities that are not finite; evaluate it in float32")
        sequence = answers.sequence.cpu().numpy()
        for row, place in enumerate(places):
            mine = sequence == row
            log_probs, likeliest, *rest = (column[mine] for column in columns)
            mean, var = rest if moments else (None, None)
            found[place] = TokenScores(log_probs, likeliest.astype(bool), mean, var, targets[place].n_closing)
        advance(len(places))
    return [found[place] for place in range(len(targets))]


def _token_columns(logits: Tensor, targets: Tensor, *, moments: bool) -> list[np.ndarray]:
    """Per token: log-probability, whether it is the likeliest, and mean and variance of log p where asked for."""
    columns: list[list[Tensor]] = [[] for _ in range(4 if moments else 2)]
    for some, wanted in zip(logits.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
        log_p = some.float().log_softmax(dim=-1)
        columns[0].append(log_p.gather(1, wanted[:, None])[:, 0])
        columns[1].append(log_p.argmax(dim=-1) == wanted)
        if moments:
            p = log_p.exp()
            weighed = torch.where(p > 0, p * log_p, 0.0)  # a token that cannot be: 0 * -inf
            mean = weighed.double().sum(dim=-1)
            columns[2].append(mean)
            columns[3].append(torch.where(p > 0, weighed * log_p, 0.0).double().sum(dim=-1) - mean**2)
    return [torch.cat(column).double().cpu().numpy() for column in columns]
