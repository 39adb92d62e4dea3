"""Model utility: what a model still knows about the retained topics (TOFU, arXiv 2401.06121)."""

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, " draw"]


def harmonic_mean(*parts: Values) -> Values:
    """Return n / sum_i 1 / x_i of n parts that are at least 0; 0 if a part is 0, NaN if a part is NaN."""
    stacked = np.stack([np.asarray(part, dtype=np.float64) for part in parts])
    with np.errstate(divide="ignore", over="ignore"):
        return len(parts) / (1 / stacked).sum(axis=0)
