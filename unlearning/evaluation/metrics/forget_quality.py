"""Forget quality: can the truth ratios of an unlearned model be told from those of a model that never knew?

The two-sample Kolmogorov-Smirnov test of TOFU (arXiv 2401.06121): D is the largest distance between the two empirical
distributions, and the p-value is D's, two-sided. For few rows a small p is out of reach, and for many it is a number
without a scale; complete separation (D = 1) has the p-value 2 / C(n + m, n) and no smaller one exists.
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
        p_value: two-sided; exact up to 10,000 rows.
        model_smaller: largest amount by which the model's distribution function is above: how far its values are
            the smaller ones (D-minus of the values, D-plus of the functions).
        model_larger: likewise below.
        n, n_control: rows of each.
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
        """-1 where D is from the model's values being smaller, 1 from their being larger, 0 where neither is more."""
        return int(np.sign(self.model_larger - self.model_smaller))

    @property
    def log10_floor(self) -> float:
        """log10 of the smallest p-value that so many rows can give."""
        return log10_floor(self.n, self.n_control)


def compare(model: Float[np.ndarray, " row"], control: Float[np.ndarray, " control_row"]) -> Comparison:
    """Test the model's values against the control's; ties count as they should."""
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
    """log10 of 2 / C(n + m, n), the p-value of complete separation."""
    return math.log10(2) - math.log10(math.comb(n + m, n))


def _distances(
    weights: Weights,
    control_weights: Float[np.ndarray, "draw control_row"],
    model: Float[np.ndarray, " row"],
    control: Float[np.ndarray, " control_row"],
) -> tuple[Values, Values]:
    """How far the model's distribution function is above the control's, and how far below, at most."""
    values = np.concatenate([model, control])
    order = np.argsort(values, kind="stable")
    ends_ties = np.append(np.diff(values[order]) > 0, True)
    total, control_total = weights.sum(axis=1, keepdims=True), control_weights.sum(axis=1, keepdims=True)
    # Cross-multiplied, so that whole numbers stay whole and equal distributions are at a distance of exactly 0.
    steps = np.concatenate([weights * control_total, -control_weights * total], axis=1)[:, order]
    gaps = steps.cumsum(axis=1)[:, ends_ties] / (total * control_total)
    return np.maximum(gaps.max(axis=1), 0.0), np.maximum(-gaps.min(axis=1), 0.0)
