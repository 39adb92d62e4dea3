"""Every loss as a pure function of logits, of negative log-likelihoods, or of hidden states.

All losses take the answer tokens of a batch as one flat list ("token"), so padding cannot enter. Sign: every loss is
minimised. Normalisation: a pooled loss divides by a number of tokens, a sequence loss by a number of sequences. Both
numbers are arguments, because under gradient accumulation they belong to the whole step batch: the
step batch's loss is then the sum over its micro-batches, however it is cut. Precision: float32 or wider, whatever
the arguments' dtype, and in log space, so that a token of log-probability -10000 has a finite loss and gradient.

Below, p is the model's distribution at a token, y the target, L_b the negative log-likelihood of sequence b summed over
its tokens, n_b the number of these tokens, e_y the one-hot vector of y, and sg the stop-gradient. All losses are in
nats, except `pdu` and `rmu`.
"""

import math
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
    """Compute the negative log-likelihood of each target, -log softmax(logits)[target].

    Computed in float32 or wider, whatever the logits' dtype. Only the logits are kept for the backward pass, since with
    a large vocabulary every tensor of this size counts.

    Args:
        logits: Logits that predict the tokens, in any floating dtype.
        targets: The tokens.
        rows: Row of each token's logits, each row at most once; None if row i belongs to token i.

    Returns:
        Negative log-likelihoods in nats.
    """
    return _TokenNLL.apply(logits, targets, torch.arange(len(targets), device=logits.device) if rows is None else rows)


PIECE = {"cpu": 2**20, "cuda": 2**24}
"""Number of logits that are processed together: on a CPU they fit into the cache, on a GPU they keep it busy."""


class _TokenNLL(torch.autograd.Function):
    """Cross-entropy and its gradient, some tokens at a time; the backward pass recomputes the softmax."""

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
    """Cut the tokens into pieces, and yield each piece with its rows."""
    size = _at_once(logits)
    for first in range(0, max(1, len(rows)), size):
        piece = slice(first, first + size)
        yield piece, rows[piece]


def _at_once(logits: Tensor) -> int:
    return max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // logits.shape[-1])


def sequence_nll(
    nll: Float[Tensor, " token"], sequence: Int[Tensor, " token"], n_sequences: int
) -> Float[Tensor, " batch"]:
    """Sum the negative log-likelihoods of each sequence's answer tokens: L_b.

    Args:
        nll: Negative log-likelihood of each token, in nats.
        sequence: Index of the sequence that each token belongs to.
        n_sequences: Size of the batch.

    Returns:
        L_b of each sequence; 0 for a sequence without tokens.
    """
    return nll.new_zeros(n_sequences).index_add(0, sequence, nll)


def sequence_mean_nll(
    nll: Float[Tensor, " token"], sequence: Int[Tensor, " token"], n_sequences: int
) -> Float[Tensor, " batch"]:
    """Average the negative log-likelihoods of each sequence's answer tokens: L_b / n_b.

    Args:
        nll: Negative log-likelihood of each token, in nats.
        sequence: Index of the sequence that each token belongs to.
        n_sequences: Size of the batch.

    Returns:
        L_b / n_b of each sequence; 0 for a sequence without tokens.
    """
    lengths = torch.bincount(sequence, minlength=n_sequences).clamp(min=1)
    return sequence_nll(nll, sequence, n_sequences) / lengths


def pooled_cross_entropy(nll: Float[Tensor, " token"], n_tokens: int) -> Float[Tensor, ""]:
    """Compute CE = (sum of the tokens' negative log-likelihoods) / n_tokens, in which every token weighs the same.

    The negative of CE is gradient ascent: unbounded below, with logit gradient (e_y - p) / n_tokens.

    Args:
        nll: Negative log-likelihood of each answer token of the micro-batch, in nats.
        n_tokens: Number of answer tokens of the whole step batch.

    Returns:
        The loss.
    """
    return nll.sum() / n_tokens


def token_divergence(
    logits: Float[Tensor, "row vocab"],
    reference_logits: Float[Tensor, "token vocab"],
    rows: Int[Tensor, " token"] | None = None,
) -> Float[Tensor, " token"]:
    """Compute KL(reference || model) of the next token at each position; 0 with gradient 0 where the two agree.

    Computed in float32 or wider; the reference is a constant. The logit gradient is p - p_ref. Besides the logits and
    the reference, nothing of their size is kept for the backward pass.

    Args:
        logits: Logits of the model, in any floating dtype.
        reference_logits: Logits of the reference model, in the tokens' order.
        rows: Row of each token's logits, each row at most once; None if row i belongs to token i.

    Returns:
        Divergences in nats.
    """
    rows = torch.arange(len(reference_logits), device=logits.device) if rows is None else rows
    return _Divergence.apply(logits, reference_logits.detach(), rows)


class _Divergence(torch.autograd.Function):
    """KL(reference || model) and its closed gradient, some tokens at a time; the backward pass recomputes both."""

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
    """Return the log-probabilities of both, in the logits' dtype or float32."""
    wide = _widened(logits)
    return wide.log_softmax(-1), reference.to(wide.dtype).log_softmax(-1)


def npo(
    nll: Float[Tensor, " batch"],
    reference_nll: Float[Tensor, " batch"],
    *,
    beta: float,
    n_sequences: int,
) -> Float[Tensor, ""]:
    """Compute negative preference optimisation, -(2 / beta) * mean_b log sigmoid(beta * (L_b - L_b^ref)).

    The loss is bounded below by 0. It is (2 / beta) ln 2 if the model equals the reference, and its gradient is that of
    -mean_b L_b there.

    Args:
        nll: L_b of each forget answer, in nats.
        reference_nll: L_b^ref, the same under the reference model; a constant.
        beta: Inverse temperature; as beta goes to 0, the gradient becomes that of gradient ascent on L_b.
        n_sequences: Number of sequences of the whole step batch.

    Returns:
        The loss.

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
    """Compute direct preference optimisation, -(2 / beta) * mean_b log sigmoid(beta * (r_b^win - r_b^lose)).

    r = L^ref - L. The losing answer is the one to forget, the winning one an alternate answer to the same prompt. The
    loss is bounded below by 0. It is (2 / beta) ln 2 if the model equals the reference, and also, without gradient, if
    the two answers are the same. Without the winning term it is `npo`.

    Args:
        win_nll: L_b of each alternate answer under the model, in nats.
        win_reference_nll: L_b of each alternate answer under the reference model; a constant.
        lose_nll: L_b of each forget answer under the model; row b belongs to row b of `win_nll`.
        lose_reference_nll: L_b of each forget answer under the reference model; a constant.
        beta: Inverse temperature.
        n_sequences: Number of pairs of the whole step batch.

    Returns:
        The loss.

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
    """Compute Kahneman-Tversky optimisation with undesirable examples only; r_b = L_b^ref - L_b, K an estimate of a KL.

        clamped:        -(2 / beta) * mean_b log sigmoid(beta * (max(0, K) - r_b)); at least 0
        kto_sigmoid:    1 - (2 / beta) * mean_b sigmoid(K - beta * r_b); between 1 - 2 / beta and 1
        kto_logsigmoid: 1 - (2 / beta) * mean_b log sigmoid(K - beta * r_b); at least 1

    If the model equals the reference and K = 0, `clamped` is (2 / beta) ln 2 with the gradient of -mean_b L_b.

    Args:
        nll: L_b of each forget answer, in nats.
        reference_nll: L_b^ref, the same under the reference model; a constant.
        kl_estimate: K, the divergence of the model from the reference on other answers, in nats; a constant.
        beta: Inverse temperature.
        n_sequences: Number of sequences of the whole step batch.
        variant: The last two are those of the NPO paper's code, which neither clamps K nor multiplies it by beta.

    Returns:
        The loss.

    Source: KTO, arXiv 2402.01306, as an unlearning loss: NPO, arXiv 2404.05868, and its code for TOFU.
    """
    log_ratio = reference_nll - nll
    if variant == "clamped":
        return _preference(beta * (max(0.0, kl_estimate) - log_ratio), beta, n_sequences)
    score = kl_estimate - beta * log_ratio
    value = score.sigmoid() if variant == "kto_sigmoid" else F.logsigmoid(score)
    return (1 - (2 / beta) * value).sum() / n_sequences


def simnpo(mean_nll: Float[Tensor, " batch"], *, beta: float, delta: float, n_sequences: int) -> Float[Tensor, ""]:
    """Compute simple NPO, without a reference: -(2 / beta) * mean_b log sigmoid(beta * (L_b / n_b - delta)).

    The loss is bounded below by 0. It is (2 / beta) ln 2 if every L_b / n_b is delta. Its derivative by L_b / n_b is
    -2 sigmoid(-beta * (L_b / n_b - delta)) / n_sequences.

    Args:
        mean_nll: L_b / n_b of each forget answer, in nats per token (see `sequence_mean_nll`).
        beta: Inverse temperature; as beta goes to 0, the gradient becomes that of gradient ascent on L_b / n_b.
        delta: Margin in nats per token; the paper's gamma is beta * delta.
        n_sequences: Number of sequences of the whole step batch.

    Returns:
        The loss.

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
    """Compute self-distillation from adjusted logits: mean_t CE(q_t, p_t), q = softmax(z_ref - beta e_y).

    The loss is bounded below by the entropy of q, reached at p = q. The logit gradient is (p - q) / n_tokens, where
    q_y = p_y^ref e^-beta / (1 - p_y^ref (1 - e^-beta)), and q is proportional to p^ref elsewhere.

    Args:
        logits: Logits of the model.
        reference_logits: z_ref, logits of the reference model; constants.
        targets: y, the tokens to forget.
        beta: Amount by which the logit of y is lowered; 0 makes the reference model itself the teacher.
        n_tokens: Number of answer tokens of the whole step batch.

    Returns:
        The loss.

    Source: UNDIAL, arXiv 2402.10052.
    """
    reference, index = _widened(reference_logits.detach()), targets[:, None]
    teacher = reference.scatter(1, index, reference.gather(1, index) - beta).softmax(-1)
    return _soft_cross_entropy(logits, teacher) / n_tokens


def ce_u(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"], *, n_tokens: int) -> Float[Tensor, ""]:
    """Compute cross-entropy unlearning: mean_t CE(sg q_t, p_t), q_v = p_v / (1 - p_y) for v other than y, q_y = 0.

    The loss is the mean of H(q) - log(1 - p_y), so it is bounded below by 0. The logit gradient is (p - q) / n_tokens.
    Its component at y is p_y: gradient ascent on log p_y, weighted by the odds p_y / (1 - p_y), and yet bounded.

    Args:
        logits: Logits of the model at all answer tokens but the first of each answer (see `follows_another`).
        targets: y, the tokens to forget.
        n_tokens: Number of these tokens in the whole step batch; with 0 the loss is 0.

    Returns:
        The loss.

    Source: CE-U, arXiv 2503.01224.
    """
    others = _widened(logits.detach()).scatter(1, targets[:, None], -torch.inf).softmax(-1)
    return _soft_cross_entropy(logits, others) / max(n_tokens, 1)


def follows_another(sequence: Int[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Mark all tokens but the first of each sequence.

    Args:
        sequence: Index of the sequence that each token belongs to; the tokens of one sequence are contiguous.

    Returns:
        False at the first token of each sequence, True elsewhere.
    """
    return sequence == F.pad(sequence, (1, 0), value=-1)[:-1]


def wga(nll: Float[Tensor, " token"], *, beta: float, n_tokens: int) -> Float[Tensor, ""]:
    """Compute weighted gradient ascent, mean_t sg(p_y^beta) log p_y, in which forgotten tokens lose their weight.

    With beta = 0 it is gradient ascent. The gradient goes to 0 with p_y, so the model stops moving; the value, a mean
    of p^beta log p, lies between -1 / (e beta) and 0.

    Args:
        nll: -log p_y of each forget token, in nats.
        beta: Power of the weight.
        n_tokens: Number of answer tokens of the whole step batch.

    Returns:
        The loss.

    Source: Rethinking LLM Unlearning Objectives (WGA), arXiv 2502.19301.
    """
    return satimp(nll, beta1=beta, beta2=0.0, n_tokens=n_tokens)


def satimp(nll: Float[Tensor, " token"], *, beta1: float, beta2: float, n_tokens: int) -> Float[Tensor, ""]:
    """Compute saturation and importance, mean_t sg(p_y^beta1 (1 - p_y)^beta2) log p_y.

    With beta2 = 0 it is `wga` with beta = beta1; with both 0 it is gradient ascent. The loss is at most 0, and bounded
    below if beta1 > 0.

    Args:
        nll: -log p_y of each forget token, in nats.
        beta1: Power of the saturation, which lowers the weight of tokens that are forgotten already.
        beta2: Power of the importance, which lowers the weight of tokens that the model is certain of.
        n_tokens: Number of answer tokens of the whole step batch.

    Returns:
        The loss.

    Source: Exploring Criteria of Loss Reweighting (SatImp), arXiv 2505.11953.
    """
    constant = nll.detach()
    weight = (-beta1 * constant).exp() * (-torch.expm1(-constant)).clamp(min=0) ** beta2
    return -(weight * nll).sum() / n_tokens


def certainty_divergence(nll: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Compute JSD(e_y, p), the Jensen-Shannon divergence of the next token's distribution from certainty of token y.

    Only p_y enters: JSD = log 2 + (p_y log p_y - (1 + p_y) log(1 + p_y)) / 2, which is 0 at p_y = 1 and log 2 at 0.

    Args:
        nll: -log p_y of each token, in nats.

    Returns:
        Divergences in nats.

    Source: Unlearning That Lasts (JensUn), arXiv 2509.02820.
    """
    probability = (-nll).exp()
    return math.log(2) - (probability * nll + (1 + probability) * torch.log1p(probability)) / 2


def jensen_shannon(
    logits: Float[Tensor, "token vocab"], reference_logits: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """Compute JSD(reference, model) of the next token at each position; 0 with gradient 0 where the two agree.

    Args:
        logits: Logits of the model, in any floating dtype.
        reference_logits: Logits of the reference model, a constant.

    Returns:
        Divergences in nats, between 0 and log 2, computed in float32 or wider.

    Source: Unlearning That Lasts (JensUn), arXiv 2509.02820.
    """
    ours, theirs = _log_softmax(logits, reference_logits.detach())
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    return ((ours.exp() * (ours - middle)).sum(-1) + (theirs.exp() * (theirs - middle)).sum(-1)) / 2


def pdu(logits: Float[Tensor, "token vocab"], *, n_tokens: int) -> Float[Tensor, ""]:
    """Compute logit margin flattening, mean_t (max_v z_v - mean_v z_v)^2, which drives the next token to a uniform one.

    The loss is bounded below by 0, reached if all logits of a token are equal. A constant added to all logits of a
    token changes nothing.

    Args:
        logits: z, logits that predict the tokens to forget.
        n_tokens: Number of answer tokens of the whole step batch.

    Returns:
        The loss, in squared logits.

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
    """Compute representation misdirection, mean_{t, i} (h_ti - target_ti)^2, over tokens t and hidden dimensions i.

    On forget text the target is the control vector c u, on retain text the hidden state of the reference model. The
    published per-token form is a squared norm: d_model times this one, in both terms alike. The loss is bounded below
    by 0, reached at the target.

    Args:
        hidden: h, a block's output at every token that is not padding.
        target: A constant of the same shape, or one vector for all tokens.
        n_positions: Number of tokens of the whole step batch.

    Returns:
        The loss, in squared units of the hidden state.

    Source: The WMDP Benchmark (RMU), arXiv 2403.03218, normalised as in its code.
    """
    distance = _widened(hidden) - _widened(target.detach())
    return distance.square().sum() / (n_positions * hidden.shape[-1])


def _preference(score: Float[Tensor, " batch"], beta: float, n_sequences: int) -> Float[Tensor, ""]:
    """Compute -(2 / beta) mean_b log sigmoid(score_b), which NPO, DPO, KTO and SimNPO have in common."""
    return -(2 / beta) * F.logsigmoid(score).sum() / n_sequences


def _soft_cross_entropy(
    logits: Float[Tensor, "token vocab"], target: Float[Tensor, "token vocab"]
) -> Float[Tensor, ""]:
    """Sum -sum_v q_v log p_v over the tokens."""
    wide = _widened(logits)
    return F.cross_entropy(wide, target.to(wide.dtype), reduction="sum")


def _widened(tensor: Tensor) -> Tensor:
    """Return half precision as float32, other dtypes unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
