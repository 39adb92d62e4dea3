"""Every loss as a pure function of logits, of negative log-likelihoods, or of hidden states.

All of them take the answer tokens of a batch as one flat list ("token"), so padding cannot enter. Sign: every loss is
minimised. Normalisation: a pooled loss divides by a number of tokens, a sequence loss by a number of sequences, and
both numbers are arguments, because under gradient accumulation they belong to the whole window of micro-batches: the
window's loss is then the sum over its micro-batches, whichever way it is cut. Precision: float32 at least, whatever the
arguments' dtype, and in log space, so that a token of log-probability -10000 has a finite loss and gradient.

Below, p is the model's distribution at a token, y the target, L_b the negative log-likelihood of sequence b summed over
its tokens, and sg the stop-gradient.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_nll(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " token"], rows: Int[Tensor, " token"] | None = None
) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each target, -log softmax(logits)[target], in nats.

    Computed in float32 at least, whatever the logits' dtype. What is kept for the backward pass are the logits alone:
    over a large vocabulary each tensor of this shape counts.

    Args:
        logits: of each token.
        targets: the tokens.
        rows: where the logits of each token stand, each row at most once; row by row if None.
    """
    return _TokenNLL.apply(logits, targets, torch.arange(len(targets), device=logits.device) if rows is None else rows)


PIECE = {"cpu": 2**20, "cuda": 2**24}
"""Logits that are worked on together: on a CPU what its cache holds, on a GPU enough to keep it busy."""


class _TokenNLL(torch.autograd.Function):
    """Cross-entropy and its gradient, some tokens at a time; the backward pass computes the softmax again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets, rows)
        parts = [
            F.cross_entropy(_widened(logits[r]), targets[piece], reduction="none") for piece, r in _cut(logits, rows)
        ]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, rows = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for piece, r in _cut(logits, rows):
            part = logits[r].requires_grad_()
            with torch.enable_grad():
                nll = F.cross_entropy(_widened(part), targets[piece], reduction="none")
            (gradient[r],) = torch.autograd.grad(nll, part, outer[piece])
        return gradient, None, None


def _cut(logits: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The tokens in pieces, with the rows of each."""
    size = _at_once(logits)
    for first in range(0, max(1, len(rows)), size):
        piece = slice(first, first + size)
        yield piece, rows[piece]


def _at_once(logits: Tensor) -> int:
    return max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // logits.shape[-1])


def sequence_nll(
    nll: Float[Tensor, " token"], sequence: Int[Tensor, " token"], n_sequences: int
) -> Float[Tensor, " batch"]:
    """Summed negative log-likelihood of each sequence, L_b = sum over its answer tokens.

    Args:
        nll: of each token.
        sequence: which sequence of the batch each token belongs to.
        n_sequences: size of the batch.
    """
    return nll.new_zeros(n_sequences).index_add(0, sequence, nll)


def sequence_mean_nll(
    nll: Float[Tensor, " token"], sequence: Int[Tensor, " token"], n_sequences: int
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each sequence per token, L_b / n_b, with n_b its number of answer tokens."""
    lengths = torch.bincount(sequence, minlength=n_sequences).clamp(min=1)
    return sequence_nll(nll, sequence, n_sequences) / lengths


def pooled_cross_entropy(nll: Float[Tensor, " token"], n_tokens: int) -> Float[Tensor, ""]:
    """CE = sum of the tokens' negative log-likelihoods / n_tokens: every token weighs the same.

    Its negative is gradient ascent, unbounded below, with logit gradient (e_y - p) / n_tokens.

    Args:
        nll: of each answer token of the micro-batch.
        n_tokens: answer tokens of the whole accumulation window.
    """
    return nll.sum() / n_tokens


def token_divergence(
    logits: Float[Tensor, "row vocab"],
    reference_logits: Float[Tensor, "token vocab"],
    rows: Int[Tensor, " token"] | None = None,
) -> Float[Tensor, " token"]:
    """KL(reference || model) of the next token at each position, in nats; 0, with gradient 0, where they agree.

    Computed in float32 at least; the reference is a constant. Logit gradient p - p_ref. Nothing else of the logits'
    size is kept for the backward pass.

    Args:
        logits: of each token.
        reference_logits: of each token, in the tokens' order.
        rows: where the logits of each token stand, each row at most once; row by row if None.
    """
    places = torch.arange(len(reference_logits), device=logits.device) if rows is None else rows
    return _Divergence.apply(logits, reference_logits.detach(), places)


class _Divergence(torch.autograd.Function):
    """KL(reference || model) and its closed gradient, some tokens at a time; the backward pass computes both again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(logits, reference, rows)
        parts = []
        for piece, r in _cut(logits, rows):
            ours, theirs = _log_softmax(logits[r], reference[piece])
            parts.append((theirs.exp() * (theirs - ours)).sum(-1))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        logits, reference, rows = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for piece, r in _cut(logits, rows):
            ours, theirs = _log_softmax(logits[r], reference[piece])
            gradient[r] = (ours.exp_().sub_(theirs.exp_()) * outer[piece, None]).to(logits.dtype)
        return gradient, None, None


def _log_softmax(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Of both, in the logits' dtype or float32."""
    wide = _widened(logits)
    return wide.log_softmax(-1), reference.to(wide.dtype).log_softmax(-1)


def npo(
    nll: Float[Tensor, " batch"],
    reference_nll: Float[Tensor, " batch"],
    *,
    beta: float,
    n_sequences: int,
) -> Float[Tensor, ""]:
    """Negative preference optimisation, -(2 / beta) * mean_b log sigmoid(beta * (L_b - L_b^ref)).

    Bounded below by 0; (2 / beta) ln 2 where the model is the reference, with the gradient of -mean_b L_b there.

    Args:
        nll: L_b, summed over each forget answer's tokens, in nats.
        reference_nll: the same under the reference model; a constant.
        beta: inverse temperature; towards 0 this is gradient ascent on the sequence sums.
        n_sequences: sequences of the whole accumulation window.

    Source: Negative Preference Optimization, arXiv 2404.05868, equation 3.
    """
    return _preference(beta * (nll - reference_nll), beta, n_sequences)


def dpo(
    win_nll: Float[Tensor, " batch"],
    win_reference_nll: Float[Tensor, " batch"],
    lose_nll: Float[Tensor, " batch"],
    lose_reference_nll: Float[Tensor, " batch"],
    *,
    beta: float,
    n_sequences: int,
) -> Float[Tensor, ""]:
    """Direct preference optimisation, -(2 / beta) * mean_b log sigmoid(beta * (r_b^win - r_b^lose)), r = L^ref - L.

    The losing answer is the one to forget, the winning one an alternate answer to the same prompt. Bounded below by 0;
    (2 / beta) ln 2 where the model is the reference, and, without gradient, where the two answers are the same. Without
    the winning term it is `npo`.

    Args:
        win_nll, win_reference_nll: summed over each alternate answer's tokens, under the model and the reference.
        lose_nll, lose_reference_nll: of the forget answers, row by row.
        beta: inverse temperature.
        n_sequences: pairs of the whole accumulation window.

    Source: Direct Preference Optimization, arXiv 2305.18290, equation 7, times 2 / beta as in NPO, arXiv 2404.05868.
    """
    margin = (lose_nll - lose_reference_nll) - (win_nll - win_reference_nll)
    return _preference(beta * margin, beta, n_sequences)


KTOVariant = Literal["clamped", "kto_sigmoid", "kto_logsigmoid"]


def kto(
    nll: Float[Tensor, " batch"],
    reference_nll: Float[Tensor, " batch"],
    *,
    kl_estimate: float,
    beta: float,
    n_sequences: int,
    variant: KTOVariant = "clamped",
) -> Float[Tensor, ""]:
    """Kahneman-Tversky optimisation with undesirable examples only; r_b = L_b^ref - L_b, K the estimate of a KL.

    clamped:        -(2 / beta) * mean_b log sigmoid(beta * (max(0, K) - r_b)); >= 0; at the reference with K = 0 it is
                    (2 / beta) ln 2 with the gradient of -mean_b L_b
    kto_sigmoid:    1 - (2 / beta) * mean_b sigmoid(K - beta * r_b); between 1 - 2 / beta and 1
    kto_logsigmoid: 1 - (2 / beta) * mean_b log sigmoid(K - beta * r_b); >= 1

    Args:
        nll: L_b, summed over each forget answer's tokens, in nats.
        reference_nll: the same under the reference model; a constant.
        kl_estimate: K, how far the model has gone from the reference on other answers; a constant.
        beta: inverse temperature.
        n_sequences: sequences of the whole accumulation window.
        variant: the last two are those of the NPO paper's code, which does not clamp K nor multiply it by beta.

    Source: KTO, arXiv 2402.01306, as an unlearning loss: NPO, arXiv 2404.05868, and its code for TOFU.
    """
    log_ratio = reference_nll - nll
    if variant == "clamped":
        return _preference(beta * (max(0.0, kl_estimate) - log_ratio), beta, n_sequences)
    score = kl_estimate - beta * log_ratio
    value = score.sigmoid() if variant == "kto_sigmoid" else F.logsigmoid(score)
    return (1 - (2 / beta) * value).sum() / n_sequences


def simnpo(mean_nll: Float[Tensor, " batch"], *, beta: float, delta: float, n_sequences: int) -> Float[Tensor, ""]:
    """Simple NPO, without reference: -(2 / beta) * mean_b log sigmoid(beta * (L_b / n_b - delta)).

    Bounded below by 0; (2 / beta) ln 2 where every L_b / n_b is delta. Derivative by L_b / n_b:
    -2 sigmoid(-beta * (L_b / n_b - delta)) / n_sequences.

    Args:
        mean_nll: L_b / n_b of each forget answer, in nats per token (`sequence_mean_nll`).
        beta: inverse temperature; towards 0 this is gradient ascent on the sequences' token means.
        delta: margin in nats per token; the paper's gamma is beta * delta.
        n_sequences: sequences of the whole accumulation window.

    Source: Simplicity Prevails (SimNPO), arXiv 2410.07163.
    """
    return _preference(beta * (mean_nll - delta), beta, n_sequences)


def undial(
    logits: Float[Tensor, "token vocab"],
    reference_logits: Float[Tensor, "token vocab"],
    targets: Int[Tensor, " token"],
    *,
    beta: float,
    n_tokens: int,
) -> Float[Tensor, ""]:
    """Self-distillation from adjusted logits: mean_t CE(q_t, p_t), q = softmax(z_ref - beta e_y).

    Bounded below by the entropy of q, reached at p = q. Logit gradient (p - q) / n_tokens, where
    q_y = p_y^ref e^-beta / (1 - p_y^ref (1 - e^-beta)) and the rest of p^ref is scaled up alike.

    Args:
        logits: of the model.
        reference_logits: z_ref, of the start model; constants.
        targets: y, the tokens to forget.
        beta: how far the logit of y is lowered; with 0 the start model itself is the teacher.
        n_tokens: answer tokens of the whole accumulation window.

    Source: UNDIAL, arXiv 2402.10052.
    """
    reference, place = _widened(reference_logits.detach()), targets[:, None]
    teacher = reference.scatter(1, place, reference.gather(1, place) - beta).softmax(-1)
    return _soft_cross_entropy(logits, teacher) / n_tokens


def ce_u(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"], *, n_tokens: int) -> Float[Tensor, ""]:
    """Cross-entropy unlearning: mean_t CE(sg q_t, p_t), q_v = p_v / (1 - p_y) for v other than y, q_y = 0.

    The value is the mean of H(q) - log(1 - p_y), so bounded below by 0. Logit gradient (p - q) / n_tokens, whose
    component at y is p_y: gradient ascent on log p_y weighed by the odds p_y / (1 - p_y), yet bounded.

    Args:
        logits: of the model, at the tokens that count (all but the first of each answer, see `follows_another`).
        targets: y, the tokens to forget.
        n_tokens: how many tokens count in the whole accumulation window; of none the loss is 0.

    Source: CE-U, arXiv 2503.01224.
    """
    others = _widened(logits.detach()).scatter(1, targets[:, None], -torch.inf).softmax(-1)
    return _soft_cross_entropy(logits, others) / max(n_tokens, 1)


def follows_another(sequence: Int[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """False at the first token of each sequence, true at the others.

    Args:
        sequence: which sequence each token belongs to; those of one sequence stand together.
    """
    return sequence == F.pad(sequence, (1, 0), value=-1)[:-1]


def wga(nll: Float[Tensor, " token"], *, beta: float, n_tokens: int) -> Float[Tensor, ""]:
    """Weighted gradient ascent, mean_t sg(p_y^beta) log p_y: tokens that are forgotten already lose their weight.

    With beta = 0 it is gradient ascent. Its gradient goes to 0 with p_y, which bounds the loss in practice: the value
    itself, as p^beta log p, is between -1 / (e beta) and 0.

    Args:
        nll: -log p_y of each forget token, in nats.
        beta: power of the weight.
        n_tokens: answer tokens of the whole accumulation window.

    Source: Rethinking LLM Unlearning Objectives (WGA), arXiv 2502.19301.
    """
    return satimp(nll, beta1=beta, beta2=0.0, n_tokens=n_tokens)


def satimp(nll: Float[Tensor, " token"], *, beta1: float, beta2: float, n_tokens: int) -> Float[Tensor, ""]:
    """Saturation and importance, mean_t sg(p_y^beta1 (1 - p_y)^beta2) log p_y.

    With beta2 = 0 it is `wga` with beta1, with both 0 gradient ascent. Not above 0, and for beta1 > 0 bounded below.

    Args:
        nll: -log p_y of each forget token, in nats.
        beta1: power of the saturation, which lets go of tokens that are forgotten.
        beta2: power of the importance, which lets go of tokens that are certain.
        n_tokens: answer tokens of the whole accumulation window.

    Source: Exploring Criteria of Loss Reweighting (SatImp), arXiv 2505.11953.
    """
    constant = nll.detach()
    weight = (-beta1 * constant).exp() * (-torch.expm1(-constant)).clamp(min=0) ** beta2
    return -(weight * nll).sum() / n_tokens


def pdu(logits: Float[Tensor, "token vocab"], *, n_tokens: int) -> Float[Tensor, ""]:
    """Logit margin flattening, mean_t (max_v z_v - mean_v z_v)^2: towards a uniform next token.

    Bounded below by 0, reached where all logits of a token are equal; the same for logits up to a constant.

    Args:
        logits: z, at the positions that predict the tokens to forget.
        n_tokens: answer tokens of the whole accumulation window.

    Source: Constrained Entropic Unlearning (PDU), arXiv 2506.05314.
    """
    wide = _widened(logits)
    return (wide.amax(-1) - wide.mean(-1)).square().sum() / n_tokens


def rmu(
    hidden: Float[Tensor, "all_token d_model"],
    target: Float[Tensor, "all_token d_model"] | Float[Tensor, " d_model"],
    *,
    n_positions: int,
) -> Float[Tensor, ""]:
    """Representation misdirection, mean_{t, i} (h_ti - target_ti)^2, over tokens and over the hidden dimension.

    On forget text the target is the control vector c u, on retain text what the start model has there. The published
    per-token form is a squared norm, d_model times this one, in both terms alike. Bounded below by 0, reached at the
    target.

    Args:
        hidden: a block's output at every token that is not padding.
        target: a constant of the same shape, or one vector for all tokens.
        n_positions: tokens of the whole accumulation window.

    Source: The WMDP Benchmark (RMU), arXiv 2403.03218, normalised as in its code.
    """
    distance = _widened(hidden) - _widened(target.detach())
    return distance.square().sum() / (n_positions * hidden.shape[-1])


def _preference(score: Float[Tensor, " batch"], beta: float, n_sequences: int) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(score): what NPO, DPO, KTO and SimNPO have in common."""
    return -(2 / beta) * F.logsigmoid(score).sum() / n_sequences


def _soft_cross_entropy(
    logits: Float[Tensor, "token vocab"], target: Float[Tensor, "token vocab"]
) -> Float[Tensor, ""]:
    """Sum over tokens of -sum_v q_v log p_v."""
    wide = _widened(logits)
    return F.cross_entropy(wide, target.to(wide.dtype), reduction="sum")


def _widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
