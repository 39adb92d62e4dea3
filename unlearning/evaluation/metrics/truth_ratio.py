"""Whether a model prefers wrong answers to the right one, from mean negative log-likelihoods per token L (nats).

The truth ratio is R = p(wrong answers) / p(right answer), with p = exp(-L) for the right one, and for the wrong ones

- geometric form: exp(-mean_j L_wj), the geometric mean of theirs, as TOFU's public code and every published table has;
- arithmetic form: mean_j exp(-L_wj), as TOFU's text (arXiv 2401.06121, equation 1).

R < 1 where the right answer is preferred. It is kept as log R, in which a collapsed model's values stay finite and
apart; the public code adds 1e-10 to denominators, which decides its values where p is near or below that.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logsumexp

Values = Float[np.ndarray, " row"]


def log_truth_ratio(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """log R of one row in the geometric form: L_c - mean_j L_wj.

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer, at least one.
    """
    return correct - float(np.mean(wrong))


def log_truth_ratio_arithmetic(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """log R of one row in the arithmetic form: L_c + log mean_j exp(-L_wj).

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer, at least one.
    """
    losses = np.asarray(wrong, dtype=np.float64)
    return correct + float(logsumexp(-losses)) - float(np.log(len(losses)))


def forget_truth_ratio(log_ratio: Values) -> Values:
    """min(R, 1/R): 1 where right and wrong answers are alike, towards 0 where either is preferred."""
    return np.exp(-np.abs(log_ratio))


def utility_truth_ratio(log_ratio: Values) -> Values:
    """max(0, 1 - R): towards 1 where the right answer is preferred, 0 where it is not."""
    return np.maximum(0.0, -np.expm1(np.minimum(log_ratio, 0.0)))


def knowledge_truth_ratio(log_ratio: Values) -> Values:
    """p(right) / (p(right) + p(wrong)) = 1 / (1 + R): 0.5 where both are alike (2506.12618)."""
    return expit(-np.asarray(log_ratio, dtype=np.float64))
