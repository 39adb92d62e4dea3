"""Probabilities of answers, from their mean negative log-likelihoods per token L (nats, the closing token included).

A probability is that of the answer to the power of one over its length, exp(-L): 1 if the model is certain of every
token, and comparable between answers of different lengths. Source: TOFU, arXiv 2401.06121, section 2.2.2.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp


def probability(mean_nll: Float[np.ndarray, " row"] | float) -> Float[np.ndarray, " row"]:
    """Return exp(-L), 0 to 1."""
    return np.exp(-np.asarray(mean_nll, dtype=np.float64))


def normalised_probability(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """Return exp(-L_c) / (exp(-L_c) + sum_j exp(-L_wj)): the right answer's share among the offered answers.

    The value is computed from differences of losses, so it is finite and correct if all probabilities underflow (the
    public code adds 1e-10 to the denominator, which then determines the value).

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer.

    Returns:
        A share, 0 to 1.
    """
    return float(np.exp(-logsumexp([0.0, *(correct - np.asarray(wrong, dtype=np.float64))])))
