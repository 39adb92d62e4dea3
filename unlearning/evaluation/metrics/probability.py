"""How likely answers are, from their mean negative log-likelihoods per token L (nats, the closing token included).

A probability here is that of the answer to the power of one over its length, exp(-L): 1 where the model is certain of
every token, and comparable between answers of different lengths. Source: TOFU, arXiv 2401.06121, section 2.2.2.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp


def probability(mean_nll: Float[np.ndarray, " row"] | float) -> Float[np.ndarray, " row"]:
    """exp(-L), between 0 and 1."""
    return np.exp(-np.asarray(mean_nll, dtype=np.float64))


def normalised_probability(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """exp(-L_c) / (exp(-L_c) + sum_j exp(-L_wj)): the right answer's share among the answers that are offered.

    Computed from differences of losses, so that it is finite and right where all of them underflow (the public code
    adds 1e-10 to the denominator, which then decides the value).

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer.
    """
    return float(np.exp(-logsumexp([0.0, *(correct - np.asarray(wrong, dtype=np.float64))])))
