"""Membership inference: scores of a text, and how well a score separates the forget set from texts never trained on.

Every score s is higher if the text looks less like a member of the training data. With forget = 0 and hold-out = 1,

    AUC = P(s_holdout > s_forget) + P(s_holdout = s_forget) / 2,

which is 1 if the forget set is memorised, 0.5 if the two sets are indistinguishable, and 0 if every forget text is less
likely than every text that the model has never seen. The goal is the control's AUC, which is 0.5 only if both sets have
the same distribution. MUSE's AUC has the opposite direction, 1 - AUC.
"""

import zlib

import numpy as np
from jaxtyping import Float

from unlearning.evaluation.statistics import Values, Weights
from unlearning.evaluation.token_scores import TokenScores

Scores = Float[np.ndarray, " row"]

FRACTION = 0.4
"""Share of the tokens that Min-K and Min-K++ read: the least likely 40 %, as in MUSE."""

_LEAST_VARIANCE = 1e-6


def min_k(log_probs: Float[np.ndarray, " token"], *, fraction: float = FRACTION) -> float:
    """Return minus the mean of the lowest max(1, floor(fraction n)) token log-probabilities, in nats (2310.16789)."""
    n_lowest = max(1, int(fraction * len(log_probs) + 1e-9))  # 0.29 x 100 is 28.999999999999996
    return -float(np.sort(log_probs)[:n_lowest].mean())


def min_k_plus_plus(scores: TokenScores, *, fraction: float = FRACTION) -> float:
    """Return Min-K of log-probabilities that are standardised by their own distribution (2404.02936).

    (log p_t - mu_t) / sqrt(max(sigma_t^2, 1e-6)), with the mean and variance of log p under p at each token.

    Args:
        scores: Scores of the text's tokens, with moments.
        fraction: Share of the tokens that is read, the lowest ones.

    Returns:
        Minus the mean of the lowest standardised log-probabilities; no unit.

    Raises:
        ValueError: The scores have no moments.
    """
    if scores.mean_log_prob is None or scores.var_log_prob is None:
        raise ValueError("Min-K++ needs score_tokens(..., moments=True)")
    spread = np.sqrt(np.maximum(scores.var_log_prob, _LEAST_VARIANCE))
    return min_k((scores.log_probs - scores.mean_log_prob) / spread, fraction=fraction)


def zlib_score(loss: float, text: str) -> float:
    """Return the loss, in nats per token, divided by the number of bytes of the compressed text (2012.07805)."""
    return loss / len(zlib.compress(text.encode()))


def loss_ratio(loss: float, other: float) -> float:
    """Return one loss divided by another; 1 if both are zero."""
    return 1.0 if loss == other else float(np.divide(loss, other)) if other else float("inf")


def auc(forget: Scores, holdout: Scores, forget_weights: Weights, holdout_weights: Weights) -> Values:
    """Compute the share of pairs in which the hold-out text scores higher; a tie counts half.

    Args:
        forget: Scores of the forget texts; may be infinite.
        holdout: Scores of the hold-out texts; may be infinite.
        forget_weights: Number of times that each draw holds each forget text.
        holdout_weights: Number of times that each draw holds each hold-out text.

    Returns:
        One value per draw, 0 to 1.
    """
    order = np.argsort(forget)
    up_to = _cumulative(forget_weights[:, order])
    below = up_to[:, np.searchsorted(forget[order], holdout, side="left")]
    not_above = up_to[:, np.searchsorted(forget[order], holdout, side="right")]
    pairs = up_to[:, -1] * holdout_weights.sum(axis=1)
    return ((below + not_above) / 2 * holdout_weights).sum(axis=1) / pairs


def detection_rate(
    forget: Scores, holdout: Scores, forget_weights: Weights, holdout_weights: Weights, *, false_alarms: float
) -> Values:
    """Compute the largest share of forget texts below a threshold that few hold-out texts are below.

    This is the true-positive rate at a low false-positive rate (2112.03570). Texts of equal score are on the same side
    of the threshold.

    Args:
        forget: Scores of the forget texts.
        holdout: Scores of the hold-out texts.
        forget_weights: Number of times that each draw holds each forget text.
        holdout_weights: Number of times that each draw holds each hold-out text.
        false_alarms: Largest share of hold-out texts below the threshold, such as 0.01.

    Returns:
        One value per draw, 0 to 1.
    """
    order, others = np.argsort(forget), np.argsort(holdout)
    thresholds = forget[order]
    found = _cumulative(forget_weights[:, order])[:, np.searchsorted(thresholds, thresholds, side="right")]
    alarms = _cumulative(holdout_weights[:, others])[:, np.searchsorted(holdout[others], thresholds, side="right")]
    totals = forget_weights.sum(axis=1), holdout_weights.sum(axis=1)
    allowed = alarms <= (false_alarms * totals[1] + 1e-9)[:, None]
    return np.where(allowed, found, 0.0).max(axis=1) / totals[0]


def privacy_leakage(unlearned: Values, control: Values | float) -> Values:
    """Compute MUSE's PrivLeak in percent: 100 (A_U - A_C) / A_C with A = 1 - AUC (2407.06460).

    Args:
        unlearned: A of the model, P(s_holdout < s_forget) with ties half: one minus this module's AUC.
        control: A of the control.

    Returns:
        One value per draw: 0 like the control; -100 the forget set is still memorised; above 0, up to
        100 (1 - A_C) / A_C, over-unlearned.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw in which the control's is zero
        return 100 * (unlearned - control) / control


def control_likeness(unlearned: Values, control: Values) -> Values:
    """Return clip(1 - |AUC_U - AUC_C| / AUC_C, 0, 1): 1 if the AUC is the control's, 0 if it is far from it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(1 - np.abs(unlearned - control) / control, 0, 1)


def _cumulative(weights: Weights) -> Float[np.ndarray, "draw row_and_one"]:
    """Return the sums of the first 0, 1, ..., all weights."""
    return np.concatenate([np.zeros((len(weights), 1)), weights.cumsum(axis=1)], axis=1)
