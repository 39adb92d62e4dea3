"""Membership inference: scores of a text, and how well a score tells the forget set from texts that nobody trained on.

Every score s is higher where the text looks less like a member of the training data. With forget = 0 and hold-out = 1,

    AUC = P(s_holdout > s_forget) + P(s_holdout = s_forget) / 2,

which goes to 1 where the forget set is memorised, is 0.5 where the two cannot be told apart, and goes to 0 where the
forget set was driven below texts that the model has never seen. A good model has the AUC of the control, which
is 0.5 only where both sets are of one distribution. MUSE's AUC is of the opposite direction, 1 - AUC.
"""

import zlib

import numpy as np
from jaxtyping import Float

from unlearning.evaluation.statistics import Values, Weights
from unlearning.evaluation.token_scores import TokenScores

Scores = Float[np.ndarray, " row"]

FRACTION = 0.4
"""Of the tokens that Min-K and Min-K++ read: the least likely 40 %, as MUSE does."""

_LEAST_VARIANCE = 1e-6


def min_k(log_probs: Float[np.ndarray, " token"], *, fraction: float = FRACTION) -> float:
    """Minus the mean of the lowest max(1, floor(fraction n)) token log-probabilities, in nats (2310.16789)."""
    n_lowest = max(1, int(fraction * len(log_probs) + 1e-9))  # 0.29 x 100 is 28.999999999999996
    return -float(np.sort(log_probs)[:n_lowest].mean())


def min_k_plus_plus(scores: TokenScores, *, fraction: float = FRACTION) -> float:
    """Min-K of log-probabilities that are standardised by their own distribution (2404.02936).

    (log p_t - mu_t) / sqrt(max(sigma_t^2, 1e-6)), with mean and variance of log p under p at each token.

    Raises:
        ValueError: the scores have no moments.
    """
    if scores.mean_log_prob is None or scores.var_log_prob is None:
        raise ValueError("Min-K++ needs score_tokens(..., moments=True)")
    spread = np.sqrt(np.maximum(scores.var_log_prob, _LEAST_VARIANCE))
    return min_k((scores.log_probs - scores.mean_log_prob) / spread, fraction=fraction)


def zlib_score(loss: float, text: str) -> float:
    """The loss, in nats a token, for every byte of the compressed text (2012.07805)."""
    return loss / len(zlib.compress(text.encode()))


def loss_ratio(loss: float, other: float) -> float:
    """One loss over another; 1 where both are zero."""
    return 1.0 if loss == other else float(np.divide(loss, other)) if other else float("inf")


def auc(forget: Scores, holdout: Scores, forget_weights: Weights, holdout_weights: Weights) -> Values:
    """The share of pairs in which the hold-out text scores higher; a tie is half a pair.

    Args:
        forget, holdout: scores; infinite ones count as such.
        forget_weights, holdout_weights: how often each row is there, for each draw.

    Returns:
        One value a draw.
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
    """The largest share of forget texts below a threshold that lets at most some share of hold-out texts below it.

    In the words of membership inference: the true-positive rate at a low false-positive rate (2112.03570). Texts of
    equal score are on the same side.

    Args:
        forget, holdout, forget_weights, holdout_weights: as in `auc`.
        false_alarms: the share of hold-out texts, such as 0.01.
    """
    order, others = np.argsort(forget), np.argsort(holdout)
    thresholds = forget[order]
    found = _cumulative(forget_weights[:, order])[:, np.searchsorted(thresholds, thresholds, side="right")]
    alarms = _cumulative(holdout_weights[:, others])[:, np.searchsorted(holdout[others], thresholds, side="right")]
    totals = forget_weights.sum(axis=1), holdout_weights.sum(axis=1)
    allowed = alarms <= (false_alarms * totals[1] + 1e-9)[:, None]
    return np.where(allowed, found, 0.0).max(axis=1) / totals[0]


def privacy_leakage(unlearned: Values, retain: Values | float) -> Values:
    """MUSE's PrivLeak in percent: 100 (A_U - A_R) / A_R with A = 1 - AUC (2407.06460).

    0 is as the control; -100 a forget set that is still memorised; positive, up to 100 (1 - A_R) / A_R, one that
    was over-unlearned.

    Args:
        unlearned, retain: MUSE's A = P(s_holdout < s_forget), a tie counted half: one minus this module's AUC.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw in which the control's is zero
        return 100 * (unlearned - retain) / retain


def control_likeness(unlearned: Values, retain: Values) -> Values:
    """clip(1 - |AUC_U - AUC_R| / AUC_R, 0, 1): 1 is the control's, 0 far from it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(1 - np.abs(unlearned - retain) / retain, 0, 1)


def _cumulative(weights: Weights) -> Float[np.ndarray, "draw row_and_one"]:
    """Sums of the first 0, 1, ..., all weights."""
    return np.concatenate([np.zeros((len(weights), 1)), weights.cumsum(axis=1)], axis=1)
