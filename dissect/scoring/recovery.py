"""KRS and the other recovery scores, as pure functions of logits.

Sign convention: 1 means that the base model's behaviour is back, 0 that the intervention did nothing, below 0
that it moved further away. Nothing is clipped. Losses are float64 sums of float32 differences.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOSS_FLOOR = 1e-12
"""With a loss between base and target below this the two models agree, and recovery is undefined."""


def per_example(
    values: Float[Tensor, " scored"], rows: Int[Tensor, " scored"], n_examples: int
) -> Float[Tensor, " example"]:
    """Average over each example's scored positions.

    Args:
        values: One value per scored position; NaN is left out.
        rows: The example of each position.
        n_examples: Number of examples.

    Returns:
        The means in float64, NaN for an example without values.
    """
    values = values.double()
    kept = ~values.isnan()
    totals = torch.zeros(n_examples, dtype=torch.float64, device=values.device)
    counts = torch.zeros_like(totals)
    totals.index_add_(0, rows, torch.where(kept, values, 0.0))
    counts.index_add_(0, rows, kept.double())
    return totals / torch.where(counts > 0, counts, torch.nan)


def logit_mse(ours: Float[Tensor, "scored vocab"], theirs: Float[Tensor, "scored vocab"]) -> Float[Tensor, " scored"]:
    """Compute the mean squared difference of raw logits over the vocabulary (2410.06606, the loss of KRS).

    The loss changes when a constant is added to all logits of a position; `centred_logit_mse` does not.

    Args:
        ours: Logits of one model.
        theirs: Logits of the other model.

    Returns:
        The loss of each position, float64.
    """
    return _mean_square(ours - theirs)


def centred_logit_mse(
    ours: Float[Tensor, "scored vocab"], theirs: Float[Tensor, "scored vocab"]
) -> Float[Tensor, " scored"]:
    """Compute `logit_mse` after subtracting each position's mean logit, which no softmax depends on.

    Args:
        ours: Logits of one model.
        theirs: Logits of the other model.

    Returns:
        The loss of each position, float64.
    """
    difference = ours - theirs
    return _mean_square(difference - difference.mean(-1, keepdim=True))


def _mean_square(difference: Float[Tensor, "scored vocab"]) -> Float[Tensor, " scored"]:
    # float32 is exact to its last digits here, and takes half the time: no term is negative, and torch sums pairwise.
    # The mean over positions is taken in float64.
    return difference.square().sum(-1).double() / difference.shape[-1]


def answer_logprob(
    logprobs: Float[Tensor, "scored vocab"], next_tokens: Int[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """Pick the log-probability of the token that follows each position.

    Args:
        logprobs: Log-probabilities in nats.
        next_tokens: The token that follows each position, -1 where none follows.

    Returns:
        Log-probabilities in nats, float64, NaN where no token follows.
    """
    picked = logprobs.gather(-1, next_tokens.clamp(min=0)[:, None])[:, 0].double()
    return torch.where(next_tokens >= 0, picked, torch.nan)


def kl_from_base(
    base_logprobs: Float[Tensor, "scored vocab"], logprobs: Float[Tensor, "scored vocab"]
) -> Float[Tensor, " scored"]:
    """Compute KL(base || model) at each position.

    Args:
        base_logprobs: Log-probabilities of the base, in nats.
        logprobs: Log-probabilities of the model, in nats.

    Returns:
        The divergence in nats, float64.
    """
    return (base_logprobs.exp() * (base_logprobs - logprobs)).sum(-1, dtype=torch.float64)


def knowledge_recovery_score(
    loss_intervened: Float[Tensor, " example"], loss_target: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Compute KRS = 1 - loss(base, intervened) / loss(base, target) (2410.06606, eq. 3).

    The same formula over KL divergences gives the KL recovery.

    Args:
        loss_intervened: Loss of the target under the intervention.
        loss_target: Loss of the target before.

    Returns:
        The scores, NaN where the target has no loss.
    """
    return 1 - loss_intervened / torch.where(loss_target > LOSS_FLOOR, loss_target, torch.nan)


def logprob_recovery(
    intervened: Float[Tensor, " example"], target: Float[Tensor, " example"], base: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Compute the recovered share of the answer's lost log-probability, (intervened - target) / (base - target).

    Args:
        intervened: Log-probability of the target under the intervention.
        target: Log-probability of the target before.
        base: Log-probability of the base.

    Returns:
        The shares, NaN where the target gives the answer at least the base's probability.
    """
    lost = base - target
    return (intervened - target) / torch.where(lost > LOSS_FLOOR, lost, torch.nan)
