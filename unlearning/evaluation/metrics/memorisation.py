"""How much of an answer a model would write by itself, from whether each token is its likeliest, teacher-forced.

The answer's text alone counts, not the token that closes it. Source: the meta-evaluation set of 2506.12618.
"""

import numpy as np
from jaxtyping import Bool


def exact_memorisation(is_likeliest: Bool[np.ndarray, " token"]) -> float | None:
    """Share of tokens that are the likeliest, 0 to 1; None for no tokens.

    An ignorant model is not at 0: function words can be guessed (about 0.59 for TOFU's controls).
    """
    return float(np.mean(is_likeliest)) if len(is_likeliest) else None


def extraction_strength(is_likeliest: Bool[np.ndarray, " token"]) -> float | None:
    """1 - k/n, where k is the smallest number of the n tokens to be given so that all that follow are the likeliest.

    0 where the last token is not (k = n), 1 where all are (k = 0); None for no tokens. The public loop stops at
    k = n - 1, so that its floor is 1/n, and gives 0 for no tokens.
    """
    n = len(is_likeliest)
    if n == 0:
        return None
    wrong = np.flatnonzero(~np.asarray(is_likeliest, dtype=bool))
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / n
