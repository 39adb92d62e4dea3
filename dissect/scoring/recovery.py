"""KRS and the other recovery scores, as pure functions of logits.

Sign convention: 1 means that the base model's behaviour is back, 0 that the intervention did nothing, below 0
that it moved further away. Nothing is clipped. Losses are float64 sums of float32 differences.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOSS_FLOOR = 1e-12
"""A loss between base and target below this is no loss: the two models agree and recovery is undefined."""


def per_example(
    values: Float[Tensor, " scored"], rows: Int[Tensor, " scored"], n_examples: int
) -> Float[Tensor, " example"]:
    """Mean over each example's scored positions, ignoring NaN; NaN where an example has none. float64."""
    values = values.double()
    kept = ~values.isnan()
    totals = torch.zeros(n_examples, dtype=torch.float64, device=values.device)
    counts = torch.zeros_like(totals)
    totals.index_add_(0, rows, torch.where(kept, values, 0.0))
    counts.index_add_(0, rows, kept.double())
    return totals / torch.where(counts > 0, counts, torch.nan)


def logit_mse(ours: Float[Tensor, "scored vocab"], theirs: Float[Tensor, "scored vocab"]) -> Float[Tensor, " scored"]:
    """Mean squared difference of raw logits over the vocabulary, per position (2410.06606, the loss of KRS).

    It is not invariant to adding a constant to all logits; `centred_logit_mse` is.
    """
    return _mean_square(ours - theirs)


def centred_logit_mse(
    ours: Float[Tensor, "scored vocab"], theirs: Float[Tensor, "scored vocab"]
) -> Float[Tensor, " scored"]:
    """`logit_mse` after each row's mean is taken off: the part of it that a softmax can see."""
    difference = ours - theirs
    return _mean_square(difference - difference.mean(-1, keepdim=True))


def _mean_square(difference: Float[Tensor, "scored vocab"]) -> Float[Tensor, " scored"]:
    # Not one of its terms is negative, and torch adds them up pairwise: float32 is exact to its last digits here, and
    # takes half the time. The positions' means are added up in float64.
    return difference.square().sum(-1).double() / difference.shape[-1]


def answer_logprob(
    logprobs: Float[Tensor, "scored vocab"], next_tokens: Int[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """Log-probability in nats of the token that follows each position; NaN where none follows (-1)."""
    picked = logprobs.gather(-1, next_tokens.clamp(min=0)[:, None])[:, 0].double()
    return torch.where(next_tokens >= 0, picked, torch.nan)


def kl_from_base(
    base_logprobs: Float[Tensor, "scored vocab"], logprobs: Float[Tensor, "scored vocab"]
) -> Float[Tensor, " scored"]:
    """KL(base || model) in nats per position."""
    return (base_logprobs.exp() * (base_logprobs - logprobs)).sum(-1, dtype=torch.float64)


def knowledge_recovery_score(
    loss_intervened: Float[Tensor, " example"], loss_target: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """KRS = 1 - loss(base, intervened) / loss(base, target) (2410.06606, eq. 3); NaN where the target has no loss.

    The same formula over KL divergences gives the KL recovery.
    """
    return 1 - loss_intervened / torch.where(loss_target > LOSS_FLOOR, loss_target, torch.nan)


def logprob_recovery(
    intervened: Float[Tensor, " example"], target: Float[Tensor, " example"], base: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Share of the answer's lost log-probability that is back: (intervened - target) / (base - target).

    NaN where the target gives the answer at least the base's probability, so that nothing was lost.
    """
    lost = base - target
    return (intervened - target) / torch.where(lost > LOSS_FLOOR, lost, torch.nan)
