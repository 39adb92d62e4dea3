"""Model utility: what a model still knows and says of what it was not to forget (TOFU, arXiv 2401.06121)."""

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, " draw"]


def harmonic_mean(*parts: Values) -> Values:
    """n / sum_i 1 / x_i of n parts that are 0 or more; 0 where one of them is, NaN where one is NaN."""
    stacked = np.stack([np.asarray(part, dtype=np.float64) for part in parts])
    with np.errstate(divide="ignore", over="ignore"):
        return len(parts) / (1 / stacked).sum(axis=0)
