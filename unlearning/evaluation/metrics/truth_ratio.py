"""Truth ratio: does a model prefer wrong answers to the right one?

From mean negative log-likelihoods per token L (nats), the truth ratio is R = p(wrong answers) / p(right answer), with
p = exp(-L) for the right answer, and for the wrong ones

- geometric form: exp(-mean_j L_wj), in open-unlearning and in the codes of NPO and SimNPO; of TOFU's own code
  (locuslab/tofu) in forget quality and in `aggregate_eval_stat.py`;
- arithmetic form: mean_j exp(-L_wj), in TOFU's text (arXiv 2401.06121, equation 1); of its own code in the truth ratios
  and the model utility of `utils.py`, which writes `aggregate_stat.csv` beside each checkpoint.

The arithmetic mean is never below the geometric one, so the arithmetic form's max(0, 1 - R) is never above the other's.

R < 1 if the right answer is preferred. This module uses log R, in which a collapsed model's values stay finite and
distinct; the public code adds 1e-10 to denominators, which determines its values if p is near or below that.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logsumexp

Values = Float[np.ndarray, " row"]


def log_truth_ratio(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """Return log R of one row in the geometric form: L_c - mean_j L_wj.

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer, at least one.

    Returns:
        log R, in nats.
    """
    return correct - float(np.mean(wrong))


def log_truth_ratio_arithmetic(correct: float, wrong: Float[np.ndarray, " answer"]) -> float:
    """Return log R of one row in the arithmetic form: L_c + log mean_j exp(-L_wj).

    Args:
        correct: L of the right answer.
        wrong: L of each wrong answer, at least one.

    Returns:
        log R, in nats.
    """
    losses = np.asarray(wrong, dtype=np.float64)
    return correct + float(logsumexp(-losses)) - float(np.log(len(losses)))


def forget_truth_ratio(log_ratio: Values) -> Values:
    """Return min(R, 1/R): 1 if right and wrong answers are equally likely, towards 0 if either is preferred."""
    return np.exp(-np.abs(log_ratio))


def utility_truth_ratio(log_ratio: Values) -> Values:
    """Return max(0, 1 - R): towards 1 if the right answer is preferred, 0 if it is not."""
    return np.maximum(0.0, -np.expm1(np.minimum(log_ratio, 0.0)))


def knowledge_truth_ratio(log_ratio: Values) -> Values:
    """Return p(right) / (p(right) + p(wrong)) = 1 / (1 + R): 0.5 if both are equally likely (2506.12618)."""
    return expit(-np.asarray(log_ratio, dtype=np.float64))
