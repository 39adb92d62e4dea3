"""How far training runs differ: the part of a residual's uncertainty that more people do not remove.

Two models that never knew the facts, trained on the same texts in another order, do not score the same under one
attack. Let v be the variance of one training run, in units of rho². The unlearned model is one run, and the control's
score is the mean over k controls, so the residual of a model without the knowledge has the variance

    v (1 + 1 / k)

beyond that of people. The rule brings v0 = run_sd² / 2, fitted on other models that were compared with one control
each (hence the 2). The k controls themselves give v1 with k - 1 degrees of freedom. The two are pooled, the rule's with
the weight n0 = `PRIOR_DF`:

    v = (n0 v0 + (k - 1) max(v1, 0)) / (n0 + k - 1)

and because v is an estimate, deviates are Student's t with n0 + k - 1 degrees of freedom instead of normal ones. With
one control v is borrowed from the rule's models. Without a control, the residual is relative to chance, and only the
unlearned model's own run adds to it; run_sd is used nevertheless, because the chance level of the questions is less
certain than a control's score.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student_t

from dissect.stress.core.result import Residual
from unlearning.common.bootstrap import LEVEL

PRIOR_DF = 8
"""Weight of the rule's `run_sd` beside the controls' own spread, in degrees of freedom.

It was fitted on 12 models of four families, each compared with the one control of its family: more than four and fewer
than 12 independent differences.
"""


@dataclass(frozen=True)
class RunSpread:
    """The spread between training runs of a model without the knowledge, around the mean of the controls.

    Attributes:
        sd: Standard deviation, in units of rho.
        df: Degrees of freedom.
        n_controls: Number of controls. With fewer than two, the standard deviation is borrowed from the rule's models.
    """

    sd: float
    df: int
    n_controls: int

    @property
    def is_borrowed(self) -> bool:
        """Whether the spread comes from the rule's models alone."""
        return self.n_controls < 2

    def deviates(self, n: int) -> Float[np.ndarray, " draw"]:
        """Return what training runs add to a residual in `n` draws: evenly spaced quantiles in a fixed random order."""
        order = np.random.default_rng(0).permutation(n)
        return np.asarray(self.sd * student_t.ppf((order + 0.5) / n, self.df))

    def interval(self, residual: Residual) -> tuple[float, float] | None:
        """Return the residual's 95 % interval over people and training runs.

        Args:
            residual: A residual.

        Returns:
            Lower and upper end; None if the residual has no interval.
        """
        if residual.draws is None or residual.low is None:
            return None
        widened = residual.draws + self.deviates(len(residual.draws))
        low, high = np.nanquantile(widened[np.isfinite(widened)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if residual.choice is not None and residual.rho is not None:
            excess = residual.choice + self.deviates(len(residual.choice))
            low = residual.rho - np.quantile(excess[np.isfinite(excess)], (1 + LEVEL) / 2)
        return float(low), float(high)


def run_spread(residuals: Iterable[Residual], run_sd: float) -> RunSpread:
    """Pool the rule's spread with that of the controls, as the module's docstring says.

    Args:
        residuals: Residuals of the rule's entries; their `run_variance` is averaged.
        run_sd: The rule's standard deviation, of models compared with one control.

    Returns:
        The spread.
    """
    known = list(residuals)
    n_controls = min((residual.n_controls for residual in known), default=0)
    own = [residual.run_variance for residual in known if residual.run_variance is not None]
    if n_controls < 2 or not own:
        return RunSpread(run_sd, PRIOR_DF, n_controls)
    df = PRIOR_DF + n_controls - 1
    variance = (PRIOR_DF * run_sd**2 / 2 + (n_controls - 1) * max(float(np.mean(own)), 0.0)) / df
    return RunSpread(float(np.sqrt(variance * (1 + 1 / n_controls))), df, n_controls)
