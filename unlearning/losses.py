"""Every loss as a pure function of logits or of negative log-likelihoods.

All of them take the answer tokens of a batch as one flat list ("token"), so padding cannot enter. Sign: every loss is
minimised. Normalisation: a pooled loss divides by a number of tokens, a sequence loss by a number of sequences, and
both numbers are arguments, because under gradient accumulation they belong to the whole window of micro-batches: the
window's loss is then the sum over its micro-batches, whichever way it is cut.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def token_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each target, -log softmax(logits)[target], in nats.

    Computed in float32 at least, whatever the logits' dtype.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


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


def pooled_cross_entropy(nll: Float[Tensor, " token"], n_tokens: int) -> Float[Tensor, ""]:
    """CE = sum of the tokens' negative log-likelihoods / n_tokens: every token weighs the same.

    Args:
        nll: of each answer token of the micro-batch.
        n_tokens: answer tokens of the whole accumulation window.
    """
    return nll.sum() / n_tokens


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
    return -(2 / beta) * F.logsigmoid(beta * (nll - reference_nll)).sum() / n_sequences
