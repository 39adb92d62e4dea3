"""What `behave` gives: rows, means with intervals per set, forget against retain, the figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.behaviour.prompts import FORGET
from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.scoring.tidy import named, records
from dissect.scoring.two_samples import Example, TwoSamples
from unlearning.common.bootstrap import Bootstrap, Estimate
from unlearning.common.runs import read_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go


OF_EACH_MODEL = ("exact_match", "probability", "perplexity")
"""Scores that the base has too."""

AGAINST_BASE = ("bleu", "rouge_l", "kl")
"""Scores of a model against the base."""

CHANGES = ("exact_match_change", "probability_change", "logprob_change")
"""A model's score minus the base's, per example."""

NO_COEFFICIENTS = pd.DataFrame(columns=["target", "set", "layer", "example_index", "group", "relative_change"])

_RENAMED = {"unrelated": "retain", "unrelated_sha256": "retain_sha256", "unrelated_sets": "retain_sets"}
"""Names in runs of earlier versions, and what they are called now."""


@dataclass(eq=False, kw_only=True)
class BehaviourResult(RunResult):
    """A finished comparison of behaviour.

    Attributes:
        frame: one row per target (`unlearned`, `control`), set and example: both models' generations (`text_base`,
            `text`), `bleu` and `rouge_l` of the target's against the base's, and of the answer `exact_match`,
            `logprob` (mean per token, nats), `probability` (its exponential, the geometric mean per token) and
            `perplexity` of the target and, with `_base`, of the base; `kl` is KL(base || target) per answer token.
        coefficients: change of the MLP coefficients per target, set, example and layer, as `dissect probe` measures
            it; empty where there are none (a mixture of experts).
    """

    frame: Copied[pd.DataFrame] = Copied()
    coefficients: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)
    _coefficients: pd.DataFrame = field(init=False, repr=False)

    @property
    def targets(self) -> list[str]:
        """`unlearned`, and `control` where there is one."""
        return list(self._frame["target"].unique())

    @property
    def sets(self) -> list[str]:
        """Names of the sets, as `forget`, `retain`, `completion`."""
        return list(self.configuration["sets"])

    def means(self) -> pd.DataFrame:
        """Mean of every score per set and model (`base` among them), with 95 % intervals.

        Columns: `set`, `model`, `metric`, `value`, `low`, `high`, `n`. `perplexity` is that of the whole set, the
        exponential of the mean loss over all its answer tokens; the others are means over examples.
        """
        return self._means.copy()

    @cached_property
    def _means(self) -> pd.DataFrame:
        rows = []
        for name in self.sets:
            bootstrap = Bootstrap(self._cell(self.targets[0], name)["group"].tolist(), seed=self.configuration["seed"])
            for model in ("base", *self.targets):
                cell = self._cell(self.targets[0] if model == "base" else model, name)
                suffix = "_base" if model == "base" else ""
                for metric in OF_EACH_MODEL if model == "base" else (*OF_EACH_MODEL, *AGAINST_BASE, *CHANGES):
                    estimate = (
                        _perplexity(bootstrap, cell, suffix)
                        if metric == "perplexity"
                        else bootstrap.mean(_values(cell, metric, suffix))
                    )
                    rows.append({"set": name, "model": model, "metric": metric} | _interval(estimate))
        return pd.DataFrame(rows)

    def contrasts(self) -> pd.DataFrame:
        """Forget minus retain, per model, retain set and metric, with 95 % intervals.

        Columns: `model`, `set` (the retain set), `metric`, `difference` and `cliffs_delta` with their `_low` and
        `_high`, `pairing` and `n`. Two sets that ask about the same examples (ids) or groups are resampled together,
        so that the difference is a paired one; others each by itself (see `two_samples`).
        """
        return self._contrasts.copy()

    @cached_property
    def _contrasts(self) -> pd.DataFrame:
        rows = []
        for name in self.configuration["retain_sets"]:
            samples = self._against(name)
            for model in self.targets:
                ours, theirs = self._cell(model, FORGET), self._cell(model, name)
                for metric in (*AGAINST_BASE, *CHANGES):
                    values = _values(ours, metric), _values(theirs, metric)
                    difference, delta = samples.difference(*values), samples.cliffs_delta(*values)
                    rows.append(
                        {"model": model, "set": name, "metric": metric}
                        | named("difference", difference)
                        | named("cliffs_delta", delta)
                        | {"pairing": samples.pairing, "n": difference.n}
                    )
        return pd.DataFrame(rows)

    def beyond_control(self) -> pd.DataFrame:
        """The unlearned model's score minus the control's, per set and metric, paired over examples.

        Both are fine-tuned from one pretrained model, one to forget and one without ever learning: what the control
        has too is no damage by unlearning. Columns: `set`, `metric`, `difference` with its `_low` and `_high`, `n`;
        empty where there is no control.
        """
        rows = []
        for name in self.sets if "control" in self.targets else []:
            ours, control = self._cell("unlearned", name), self._cell("control", name)
            bootstrap = Bootstrap(ours["group"].tolist(), seed=self.configuration["seed"])
            for metric in ("exact_match", "probability", "logprob", *AGAINST_BASE):
                estimate = bootstrap.mean(_values(ours, metric) - _values(control, metric))
                rows.append({"set": name, "metric": metric} | named("difference", estimate) | {"n": estimate.n})
        return pd.DataFrame(rows, columns=["set", "metric", "difference", "difference_low", "difference_high", "n"])

    def coefficient_curve(self) -> pd.DataFrame:
        """Relative change of the MLP coefficients per target, set and layer, with 95 % intervals.

        Columns: `target`, `set`, `layer`, `value`, `low`, `high`, `n`; empty where there are no coefficients.
        """
        rows = []
        for (target, name, layer), cell in self._coefficients.groupby(["target", "set", "layer"], sort=False):
            cell = cell.sort_values("example_index")
            bootstrap = Bootstrap(cell["group"].tolist(), seed=self.configuration["seed"])
            mean = bootstrap.mean(cell["relative_change"].to_numpy(np.float64))
            rows.append({"target": target, "set": name, "layer": layer} | _interval(mean))
        return pd.DataFrame(rows, columns=["target", "set", "layer", "value", "low", "high", "n"])

    def selectivity(self) -> pd.DataFrame:
        """Relative change of the coefficients on forget prompts divided by that on retain prompts, per layer.

        1: the mechanism touches what was to stay as much as what was to go. Columns: `target`, `set`,
        `layer`, `selectivity` with its `_low` and `_high`, `n`; empty where there are no coefficients.
        """
        rows = []
        for name in self.configuration["retain_sets"]:
            samples = self._against(name)
            for (target, layer), cell in self._coefficients.groupby(["target", "layer"], sort=False):
                ours, theirs = (
                    cell[cell["set"] == which].sort_values("example_index")["relative_change"].to_numpy(np.float64)
                    for which in (FORGET, name)
                )
                ratio = samples.ratio(ours, theirs)
                place = {"target": target, "set": name, "layer": layer}
                rows.append(place | named("selectivity", ratio) | {"n": ratio.n})
        columns = ["target", "set", "layer", "selectivity", "selectivity_low", "selectivity_high", "n"]
        return pd.DataFrame(rows, columns=columns)

    def _against(self, name: str) -> TwoSamples:
        ours, theirs = (self._cell(self.targets[0], which) for which in (FORGET, name))
        return TwoSamples(_examples(ours), _examples(theirs), seed=self.configuration["seed"])

    def _cell(self, target: str, name: str) -> pd.DataFrame:
        chosen = self._frame[(self._frame["target"] == target) & (self._frame["set"] == name)]
        return chosen.sort_values("example_index")

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        selectivity = self.selectivity()
        last = selectivity[selectivity["layer"] == selectivity["layer"].max()]
        return {
            "configuration": self.configuration,
            **self.provenance,
            "means": records(self.means()),
            "contrasts": records(self.contrasts()),
            "beyond_control": records(self.beyond_control()),
            "selectivity_last_layer": records(last),
        }

    def figure(self) -> "go.Figure":
        """Every score, the sets beside each other, with 95 % intervals."""
        from dissect.behaviour.figures import means_figure

        return means_figure(self.means(), title=self.title)

    def coefficient_figure(self) -> "go.Figure":
        """Relative change of the MLP coefficients by layer, a line per set, the control dashed."""
        from dissect.behaviour.figures import coefficient_figure

        return coefficient_figure(self.coefficient_curve(), title=self.title)

    def figures(self) -> dict[str, "go.Figure"]:
        """Return the figures of the run directory: `behaviour` and, with dense MLPs, `coefficients`."""
        figures = {"behaviour": self.figure()}
        return figures | ({"coefficients": self.coefficient_figure()} if len(self._coefficients) else {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that the figures show: `behaviour` and, with dense MLPs, `coefficients`."""
        tables = {"behaviour": self.means()}
        return tables | ({"coefficients": self.coefficient_curve()} if len(self._coefficients) else {})

    def _files(self) -> dict[str, pd.DataFrame]:
        return {RESULTS: self._frame} | ({"coefficients": self._coefficients} if len(self._coefficients) else {})


def load_behave(path: str | Path) -> BehaviourResult:
    """Read a finished run directory of `dissect behave`.

    Raises:
        InputError: not such a run directory, not finished, or a table of it is broken.
    """
    path = Path(path)
    common = read_result(path, "behave", renamed=_RENAMED)
    coefficients = path / "coefficients.parquet"
    changes = read_frame(coefficients) if coefficients.is_file() else NO_COEFFICIENTS
    return BehaviourResult(
        frame=read_frame(path / "results.parquet").replace({"set": _RENAMED}),
        coefficients=changes.replace({"set": _RENAMED}),
        **common,
    )


def _values(cell: pd.DataFrame, metric: str, suffix: str = "") -> np.ndarray:
    if metric in CHANGES:
        score = metric.removesuffix("_change")
        return (cell[score] - cell[f"{score}_base"]).to_numpy(np.float64)
    return cell[metric + suffix].to_numpy(np.float64)


def _perplexity(bootstrap: Bootstrap, cell: pd.DataFrame, suffix: str) -> Estimate:
    tokens = cell["n_answer_tokens"].to_numpy(np.float64)
    loss = bootstrap.ratio(-cell[f"logprob{suffix}"].to_numpy(np.float64) * tokens, tokens)
    value, low, high = np.exp([loss.value, loss.low, loss.high]).tolist()
    return Estimate(value, low, high, loss.n)


def _examples(cell: pd.DataFrame) -> list[Example]:
    # Records without an id are numbered, which says nothing about two files.
    return [
        Example("" if name == str(index) else name, group)
        for name, index, group in zip(cell["example"], cell["example_index"], cell["group"], strict=True)
    ]


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
