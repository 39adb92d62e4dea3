"""Check that a verdict does not depend on how the unlearned model's weights are written."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dissect.models.pair import ModelPair
from dissect.models.rewriting import rewritten
from dissect.prompts.prompts import Prompts
from dissect.verdicts.result import Verdict
from dissect.verdicts.run import verdict

TOLERANCE = 0.02
"""Largest difference of a score that counts as none: what rounding does to weights, training may amplify."""


@dataclass(frozen=True, eq=False)
class Invariance:
    """Verdicts on one model, as it was given and rewritten at random.

    Attributes:
        frame: One row per form of the model with `form` (`as given`, `rewriting 0`, ...), `label`, `score`, `low`,
            `high`, and the largest difference of a test's residual from that of the given form, `rho_moved`.
    """

    frame: pd.DataFrame

    @property
    def holds(self) -> bool:
        """Whether every rewriting has the given form's label, and its score within `TOLERANCE`."""
        scores = self.frame["score"].to_numpy(dtype=np.float64)
        moved = np.nanmax(np.abs(scores - scores[0])) if np.isfinite(scores).any() else 0.0
        return self.frame["label"].nunique() == 1 and bool(moved <= TOLERANCE)

    def sentence(self) -> str:
        """Return the result in one sentence."""
        first, rest = self.frame.iloc[0], self.frame.iloc[1:]
        if self.holds:
            return (
                f"invariance holds: rewritten at random {len(rest)} times without a change of its outputs, the model "
                f"gets the same label, and no residual moves by more than {rest['rho_moved'].max():.2g}"
            )
        labels = ", ".join(f"{row['label']} ({row['score']:.2f})" for _, row in rest.iterrows())
        return (
            f"invariance fails: as given the model is {first['label']} ({first['score']:.2f}), rewritten without a "
            f"change of its outputs {labels}. Do not rely on this verdict, and report the architecture"
        )


def check_invariance(
    found: Verdict, pair: ModelPair, forget: Prompts, *, seeds: Sequence[int] = (0,), **options: Any
) -> Invariance:
    """Judge the unlearned model again, rewritten at random without a change of its outputs.

    Args:
        found: The verdict on the pair.
        pair: The pair as it was judged.
        forget: The forget prompts of the verdict.
        seeds: Random seed of each rewriting.
        options: The options of the verdict but `out` and `progress`; see `dissect.verdict`.

    Returns:
        The verdicts on all forms.

    Raises:
        InputError: A model is not in memory.

    Examples:
        >>> from dissect import load_pair, load_prompts, verdict
        >>> from dissect.verdicts.invariance import check_invariance
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo", progress=False)
        >>> forget = load_prompts(question_set("forget"), pair.tokenizer)
        >>> found = verdict(pair, forget, budget="quick", limit=24, progress=False)  # doctest: +SKIP
        >>> check_invariance(found, pair, forget, budget="quick", limit=24).holds  # doctest: +SKIP
        True
    """
    rows = [_row("as given", found, found)]
    with tempfile.TemporaryDirectory() as folder:
        # Base and control are attacked once for all forms.
        options["shared"] = options.get("shared") or Path(folder)
        for seed in seeds:
            other = replace(pair, unlearned=rewritten(pair.unlearned, seed=seed))
            again = verdict(other, forget, progress=False, **options)
            rows.append(_row(f"rewriting {seed}", again, found))
    return Invariance(pd.DataFrame(rows))


def _row(form: str, found: Verdict, given: Verdict) -> dict[str, Any]:
    """Return the label and the score, and how far a residual moved from the given form's."""
    ours, theirs = found.residuals, given.residuals
    # Tests on weights as they are written may move: that is what they are for.
    names = [name for name in ours if name in theirs and "_as_written" not in name]
    pairs = [(ours[name].rho, theirs[name].rho) for name in names]
    moved = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    score = found.score
    return {
        "form": form,
        "label": found.label,
        "score": score.value,
        "low": score.low,
        "high": score.high,
        "rho_moved": max(moved, default=0.0),
    }
