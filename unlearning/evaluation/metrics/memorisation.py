"""Share of an answer that a model would write by itself, from whether each token is its likeliest, teacher-forced.

Only the answer's text counts, not the token that closes it. Source: the meta-evaluation of 2506.12618.
"""

import numpy as np
from jaxtyping import Bool


def exact_memorisation(is_likeliest: Bool[np.ndarray, " token"]) -> float | None:
    """Return the share of tokens that are the likeliest, 0 to 1 (TOFU's controls: 0.59); None for no tokens."""
    return float(np.mean(is_likeliest)) if len(is_likeliest) else None


def extraction_strength(is_likeliest: Bool[np.ndarray, " token"]) -> float | None:
    """Return 1 - k/n, where k is the smallest number of given tokens after which all n - k others are the likeliest.

    The public loop stops at k = n - 1, so its smallest value is 1/n, and it returns 0 for no tokens.

    Args:
        is_likeliest: Whether each of the n tokens is the likeliest.

    Returns:
        0 if the last token is not the likeliest (k = n), 1 if all are (k = 0); None for no tokens.
    """
    n = len(is_likeliest)
    if n == 0:
        return None
    wrong = np.flatnonzero(~np.asarray(is_likeliest, dtype=bool))
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / n
