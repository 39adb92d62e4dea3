"""What the benchmark says about the verdict and about every single number, on families that nothing was fitted on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from analyses.verdict_benchmark.constructions import BY_HAND, PARTLY_TAUGHT
from analyses.verdict_benchmark.measured import (
    OWN,
    STILL_ANSWERS,
    Measured,
    labelled,
    largest_residual,
    without_control,
)
from dissect.stress.core.result import Residual, StressResult
from dissect.verdicts.rule import Label, Rule, Rules, Score, decide, residual_knowledge
from dissect.verdicts.signs import Signs, read_signs
from dissect.verdicts.spread import run_spread

VERDICT = "verdict"
ALONE = "verdict without control"
DRAWS = 2000
POWER = 0.9
FOUND_OUT = ("suppressed", "not unlearned")
"""Labels that say that knowledge is there."""

NOTHING = "nothing to hide"

NET = ", net of control"
"""Suffix of a test's name for its residual, which is net of the control under the same attack."""


def judged(models: Sequence[Measured], rules: Rules) -> pd.DataFrame:
    """Judge every model, with its control and without.

    Args:
        models: The models.
        rules: The rules.

    Returns:
        One row per model: what it is, `label` and `score` with `low` and `high`, and the same `without control`,
        residuals (`rho TEST`) and rival numbers.
    """
    rows = []
    for model in models:
        label, score = _judged(model.residuals, model.results, rules.with_control, model.retain)
        results = [without_control(result) for result in model.results if result.test in OWN]
        label_alone, alone = _judged(model.alone, results, rules.without_control, model.retain)
        rows.append(
            {
                "family": f"{model.architecture}-{model.seed}",
                "model": model.name,
                "made": model.made,
                "kind": model.kind,
                "share": model.share,
                "forget": model.forget,
                "retain": model.retain,
                "collapsed": model.collapsed,
                "label": label,
                "score": score.value,
                "low": score.low,
                "high": score.high,
                "label without control": label_alone,
                "score without control": alone.value,
                "low without control": alone.low,
                "high without control": alone.high,
                **{f"rho {name}": residual.rho for name, residual in model.residuals.items()},
                **model.rivals,
            }
        )
    return pd.DataFrame(rows)


def _judged(
    residuals: Mapping[str, Residual], results: Sequence[StressResult], rule: Rule, utility: float
) -> tuple[Label, Score]:
    """Return label and score; the score decides alone where no results were kept."""
    score = residual_knowledge(residuals, rule)
    signs: Signs | None = None
    if results:
        signs = read_signs(results, score.spread or run_spread([], rule.run_sd))
    return decide(score, residuals["without_attack"], rule, utility=utility, signs=signs), score


def moved(frame: pd.DataFrame, rewritten: pd.DataFrame) -> pd.DataFrame:
    """Compare the verdicts of models with those of the same models written otherwise.

    Args:
        frame: Table of the judged models, as `judged` returns it.
        rewritten: The same of their rewritten forms.

    Returns:
        One row per model that is in both: `family`, `model`, and with and without a control both labels (`label`,
        `label rewritten`), how far the score moved (`score moved`) and, over all tests, how far a residual did
        (`rho moved`).
    """
    both = frame.merge(rewritten, on=["family", "model"], suffixes=("", " rewritten"))
    table = both[["family", "model"]].copy()
    for said in ("", " without control"):
        for column in (f"label{said}", f"label{said} rewritten"):
            table[column] = both[column]
        table[f"score{said} moved"] = (both[f"score{said}"] - both[f"score{said} rewritten"]).abs()
    names = [name for name in frame.columns if name.startswith("rho ") and f"{name} rewritten" in both]
    gaps = [(both[name].astype(float) - both[f"{name} rewritten"].astype(float)).abs() for name in names]
    table["rho moved"] = pd.concat(gaps, axis=1).max(axis=1)
    return table


def numbers_of(model: Measured, rules: Rules) -> dict[str, float]:
    """Return all numbers of a model that can be compared with the truth.

    Args:
        model: The model.
        rules: The rules.

    Returns:
        The numbers by name, higher for more knowledge; NaN if there is none.
    """
    found = {
        VERDICT: largest_residual(model.residuals, rules.with_control.tests),
        ALONE: largest_residual(model.alone, rules.without_control.tests),
    }
    found |= model.rivals
    nets = {name.replace("_", " ") + NET: residual.rho for name, residual in model.residuals.items()}
    return found | {name: np.nan if rho is None else rho for name, rho in nets.items()}


def rates(calibration: Sequence[Measured], report: Sequence[Measured], rules: Rules) -> pd.DataFrame:
    """Measure how well each number separates models that hold the knowledge from those that do not.

    Broken models are left out. The verdict is represented by its largest residual, before it is clipped to [0, 1].

    Args:
        calibration: Models on which thresholds are chosen.
        report: Models on which the rates are measured.
        rules: The rules.

    Returns:
        One row per number, the best first: `number`, `auroc` with its interval `low`, `high` (bootstrap over models of
        each kind), `silent` (AUROC without the models that still give most answers, which nobody would take for
        unlearned), `accuracy` (balanced, at the threshold that is best on the calibration families; NaN without any),
        `false_alarms` (models without the knowledge above it; NaN without a threshold) and `n` (models with a number).
    """
    (before, before_holds, _), (after, holds, speaks) = _numbers(calibration, rules), _numbers(report, rules)
    rows = []
    for name in after.columns:
        known = after[name].notna().to_numpy()
        if len(set(holds[known])) < 2:  # a test that was not run
            continue
        x, y = after[name].to_numpy(dtype=np.float64)[known], holds[known]
        threshold = np.nan
        if name in before:
            fit = before[name].notna().to_numpy()
        if name in before and len(set(before_holds[fit])) == 2:
            threshold = best_threshold(before[name].to_numpy(dtype=np.float64)[fit], before_holds[fit])
        low, high = _interval(x, y)
        silent = ~speaks[known]
        rows.append(
            {
                "number": name,
                "auroc": float(roc_auc_score(y, x)),
                "low": low,
                "high": high,
                "silent": float(roc_auc_score(y[silent], x[silent])),
                "accuracy": float(balanced_accuracy_score(y, x > threshold)) if np.isfinite(threshold) else np.nan,
                "false_alarms": int((x[~y] > threshold).sum()) if np.isfinite(threshold) else np.nan,
                "n": int(known.sum()),
            }
        )
    return pd.DataFrame(rows).sort_values("auroc", ascending=False, kind="stable", ignore_index=True)


def _numbers(
    models: Sequence[Measured], rules: Rules
) -> tuple[pd.DataFrame, Bool[np.ndarray, " model"], Bool[np.ndarray, " model"]]:
    """Return the labelled models' numbers, whether they hold the knowledge, and whether they still answer."""
    kept, holds = labelled(models)
    table = pd.DataFrame([numbers_of(model, rules) for model in kept])
    return table, np.array(holds, dtype=bool), np.array([model.forget > STILL_ANSWERS for model in kept], dtype=bool)


def best_threshold(x: Float[np.ndarray, " model"], holds: Bool[np.ndarray, " model"]) -> float:
    """Choose the threshold with the best balanced accuracy.

    Args:
        x: The number of each model.
        holds: Whether each model holds the knowledge.

    Returns:
        The middle of the gap below the value whose balanced accuracy is best; the lowest of equally good ones.
    """
    false, true, values = roc_curve(holds, x, drop_intermediate=False)
    best = np.flatnonzero(true - false == (true - false).max())[-1]
    below = x[x < values[best]]
    return float((values[best] + below.max()) / 2) if len(below) else float(values[best] - 1)


def _interval(x: Float[np.ndarray, " model"], holds: Bool[np.ndarray, " model"]) -> tuple[float, float]:
    """Return the interval of the AUROC (share of pairs in the right order) over draws of the models of each kind."""
    holding, without = x[holds][:, None], x[~holds][None, :]
    in_order = (holding > without) + 0.5 * (holding == without)
    generator = np.random.default_rng(0)
    of_holding, of_without = (generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in in_order.shape)
    draws = np.einsum("di,ij,dj->d", of_holding, in_order, of_without, optimize=True) / in_order.size
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def labels(frame: pd.DataFrame, *, column: str = "label") -> pd.DataFrame:
    """Count how often each label is given to models that were made in the same way.

    Args:
        frame: Table of the judged models, as `judged` returns it.
        column: Column of the labels.

    Returns:
        One row per `kind` (by construction), `made`, `share` (if it is known) and `state` (broken, answers left, or
        empty), with one column for each label.
    """
    state = np.select([frame["collapsed"], frame["forget"] > STILL_ANSWERS], ["broken", "answers left"], "")
    by = ["kind", "made", "share", "state"]
    table = frame.assign(state=state).groupby([*by, column], dropna=False).size().unstack(fill_value=0)
    order = ["not unlearned", "suppressed", "inconclusive", "erased"]
    return table.reindex(columns=order, fill_value=0).reset_index().rename_axis(columns=None)


def right_labels(frame: pd.DataFrame, *, column: str = "label") -> dict[str, Any]:
    """Count right labels and false alarms, over unbroken models that hold all or none of the knowledge.

    A model that still gives the answers is rightly called not unlearned or suppressed.

    Args:
        frame: Table of the judged models, as `judged` returns it.
        column: Column of the labels.

    Returns:
        The counts by name.
    """
    erased = frame[(frame["kind"] == "erased") & ~frame["collapsed"]][column]
    holding = frame[(frame["kind"] == "suppressed") & ~frame["collapsed"]][column]
    right = int((erased == "erased").sum() + holding.isin(FOUND_OUT).sum())
    alarms = erased.isin(FOUND_OUT)
    return {
        "models": len(erased) + len(holding),
        "right": right,
        "inconclusive": int((erased == "inconclusive").sum() + (holding == "inconclusive").sum()),
        "erased_called_suppressed": int(alarms.sum()),
        "erased": len(erased),
        "holding_called_erased": int((holding == "erased").sum()),
        "holding": len(holding),
    }


def power(frame: pd.DataFrame, *, said: str = "") -> pd.DataFrame:
    """Measure how often knowledge is found, by true share and by the method that hid it.

    Args:
        frame: Table of the judged models, as `judged` returns it.
        said: Which verdicts count: "" with a control, " without control" without one.

    Returns:
        One row per `share` and `hidden by`: `n`, `found` (share called suppressed or not unlearned) with its interval
        (Clopper-Pearson), and the mean, lowest and highest `score` of the models.
    """
    partial = frame[frame["share"].notna() & ~frame["collapsed"] & (frame["kind"] != "not unlearned")]
    rows = []
    for (share, hidden), part in partial.groupby([partial["share"], partial.apply(_hidden, axis=1)]):
        found, score = part[f"label{said}"].isin(FOUND_OUT), part[f"score{said}"]
        interval = binomtest(int(found.sum()), len(found)).proportion_ci()
        rows.append(
            {
                "share": share,
                "hidden by": hidden,
                "n": len(part),
                "found": float(found.mean()),
                "found_low": interval.low,
                "found_high": interval.high,
                "score": score.mean(),
                "score_low": score.min(),
                "score_high": score.max(),
            }
        )
    return pd.DataFrame(rows)


def _hidden(row: pd.Series) -> str:
    """Return the method that hid what a model holds."""
    if row["kind"] == "erased":
        return NOTHING
    return str(row["made"]).removeprefix(PARTLY_TAUGHT)


def least_share(table: pd.DataFrame) -> dict[str, float | None]:
    """Find the least share from which on at least `POWER` of the models are found, by method.

    Args:
        table: Power, as `power` returns it.

    Returns:
        The share by method; None if no share is found as often.
    """
    found: dict[str, float | None] = {}
    for hidden, part in table.groupby("hidden by"):
        if hidden in (BY_HAND, NOTHING):
            continue
        least = None
        for _, row in part.sort_values("share", ascending=False).iterrows():
            if row["found"] < POWER:
                break
            least = float(row["share"])
        found[str(hidden)] = least
    return found


def score_error(frame: pd.DataFrame, *, column: str = "score") -> float:
    """Return the root mean square difference between a score and the true share, over models whose share is known."""
    known = frame[frame["share"].notna() & ~frame["collapsed"]]
    return float(np.sqrt(np.mean((known[column] - known["share"]) ** 2)))


def reference(frame: pd.DataFrame, *, column: str = "score") -> Mapping[str, list[float]]:
    """Return the scores by kind of model, for comparison with a user's score.

    Args:
        frame: Table of the judged models, as `judged` returns it.
        column: Column of the scores.

    Returns:
        The scores in increasing order, by kind.
    """
    whole = frame[~frame["collapsed"] & frame[column].notna()]
    kinds = {"erased": "erased", "partial": "partly erased", "suppressed": "suppressed"}
    return {name: sorted(whole[whole["kind"] == kind][column].round(3)) for kind, name in kinds.items()}
