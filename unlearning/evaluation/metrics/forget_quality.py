"""Forget quality: do the truth ratios of an unlearned model differ from those of a control?

The two-sample Kolmogorov-Smirnov test of TOFU (arXiv 2401.06121): D is the largest distance between the two empirical
distribution functions, and the p-value is that of D, two-sided. The smallest possible p-value, at complete separation
(D = 1), is 2 / C(n + m, n): it is large for few rows, and p-values for different numbers of rows cannot be compared.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import ks_2samp

Weights = Float[np.ndarray, "draw row"]
Values = Float[np.ndarray, " draw"]


@dataclass(frozen=True)
class Comparison:
    """A two-sample Kolmogorov-Smirnov test of the model's values against the control's.

    Attributes:
        p_value: Two-sided p-value; exact up to 10,000 rows.
        model_smaller: Largest amount by which the model's distribution function is above the control's, that is, by
            which the model's values are smaller.
        model_larger: Largest amount by which the model's distribution function is below the control's.
        n: Number of rows of the model.
        n_control: Number of rows of the control.
    """

    p_value: float
    model_smaller: float
    model_larger: float
    n: int
    n_control: int

    @property
    def statistic(self) -> float:
        """D, from 0 (the same values) to 1 (complete separation)."""
        return max(self.model_smaller, self.model_larger)

    @property
    def direction(self) -> int:
        """-1 if D comes from the model's values being smaller, 1 if from their being larger, 0 if neither."""
        return int(np.sign(self.model_larger - self.model_smaller))

    @property
    def log10_floor(self) -> float:
        """log10 of the smallest p-value that this number of rows can give."""
        return log10_floor(self.n, self.n_control)


def compare(model: Float[np.ndarray, " row"], control: Float[np.ndarray, " control_row"]) -> Comparison:
    """Test the model's values against the control's; ties are handled exactly.

    Args:
        model: Values of the model.
        control: Values of the control.

    Returns:
        p-value and distances.
    """
    smaller, larger = _distances(np.ones((1, len(model))), np.ones((1, len(control))), model, control)
    with warnings.catch_warnings():
        # An exact p-value that rounds to above 1 is replaced by the asymptotic one, which is 1.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        result = ks_2samp(model, control, alternative="two-sided", method="auto")
    return Comparison(float(result.pvalue), float(smaller[0]), float(larger[0]), len(model), len(control))


def statistic(
    weights: Weights,
    control_weights: Float[np.ndarray, "draw control_row"],
    model: Float[np.ndarray, " row"],
    control: Float[np.ndarray, " control_row"],
) -> Values:
    """D of weighted rows, draw by draw."""
    return np.maximum(*_distances(weights, control_weights, model, control))


def log10_floor(n: int, m: int) -> float:
    """Return log10 of 2 / C(n + m, n), the p-value of complete separation.

    Args:
        n: Number of rows of one sample.
        m: Number of rows of the other.

    Returns:
        A negative number.
    """
    return math.log10(2) - math.log10(math.comb(n + m, n))


def _distances(
    weights: Weights,
    control_weights: Float[np.ndarray, "draw control_row"],
    model: Float[np.ndarray, " row"],
    control: Float[np.ndarray, " control_row"],
) -> tuple[Values, Values]:
    """Return the largest distances by which the model's distribution function is above and below the control's."""
    values = np.concatenate([model, control])
    order = np.argsort(values, kind="stable")
    ends_ties = np.append(np.diff(values[order]) > 0, True)
    total, control_total = weights.sum(axis=1, keepdims=True), control_weights.sum(axis=1, keepdims=True)
    # Cross-multiplied, so that whole numbers stay whole and equal distributions are at a distance of exactly 0.
    steps = np.concatenate([weights * control_total, -control_weights * total], axis=1)[:, order]
    gaps = steps.cumsum(axis=1)[:, ends_ties] / (total * control_total)
    return np.maximum(gaps.max(axis=1), 0.0), np.maximum(-gaps.min(axis=1), 0.0)
