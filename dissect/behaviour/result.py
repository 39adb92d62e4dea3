"""The result of `behave`: rows, means with intervals, differences between the sets, and figures."""

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


OF_EACH_MODEL = ("exact_match", "probability", "perplexity", "empty")
"""Scores of a single model, also of the base."""

AGAINST_BASE = ("bleu", "rouge_l", "kl")
"""Scores that compare a model with the base."""

CHANGES = ("exact_match_change", "probability_change", "logprob_change")
"""Score of a model minus that of the base, per example."""

NO_COEFFICIENTS = pd.DataFrame(columns=["target", "set", "layer", "example_index", "group", "relative_change"])

_RENAMED = {"unrelated": "retain", "unrelated_sha256": "retain_sha256", "unrelated_sets": "retain_sets"}
"""Present names by the names in runs of earlier versions."""


@dataclass(eq=False, kw_only=True)
class BehaviourResult(RunResult):
    """A finished comparison of behaviour.

    Attributes:
        frame: One row per target (`unlearned`, `control`), set and example: the generations of base and target
            (`text_base`, `text`), `bleu` and `rouge_l` between them (0 where one is empty, NaN where the base's has no
            word to count), and for the answer `exact_match`, `logprob` (mean per token, nats), `probability` (its
            exponential, the geometric mean per token) and `perplexity` of the target and, with `_base`, of the base;
            `kl` is KL(base || target) per answer token, in nats.
        coefficients: Change of the MLP coefficients per target, set, example and layer, as in `dissect probe`; empty
            for a mixture of experts.
    """

    frame: Copied[pd.DataFrame] = Copied()
    coefficients: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)
    _coefficients: pd.DataFrame = field(init=False, repr=False)

    @property
    def targets(self) -> list[str]:
        """`unlearned` and, if there is one, `control`."""
        return list(self._frame["target"].unique())

    @property
    def sets(self) -> list[str]:
        """Names of the sets, such as `forget`, `retain` and `completion`."""
        return list(self.configuration["sets"])

    def means(self) -> pd.DataFrame:
        """Compute the mean of every score per set and model (also of the base), with 95 % intervals.

        Returns:
            One row per set, model and metric with the columns `set`, `model`, `metric`, `value`, `low`, `high` and `n`.
            `perplexity` is that of the whole set (the exponential of the mean loss over all answer tokens); the other
            scores are means over examples. `empty` is the share of generated texts that are empty: such a text matches
            nothing, not even an empty text of the base.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> means = result.means()
            >>> exact = means[(means["set"] == "forget") & (means["metric"] == "exact_match")]
            >>> float(exact.set_index("model").loc["base", "value"])  # the base answers every forget question
            1.0
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
        """Compute scores on forget prompts minus scores on retain prompts, with 95 % intervals.

        Sets with the same examples (ids) or groups are resampled together, so that the difference is paired; other
        sets are resampled separately (see `dissect.scoring.two_samples`).

        Returns:
            One row per model, retain set and metric with the columns `model`, `set` (the retain set), `metric`,
            `difference` and `cliffs_delta` with `_low` and `_high`, `pairing` and `n`.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> set(result.contrasts()["set"])
            {'retain'}
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
        """Compute the unlearned model's scores minus the control's, paired over examples, with 95 % intervals.

        Unlearned model and control come from the same pretrained model; the control was never trained on the forget
        facts. A change that the control shows too is no damage by unlearning.

        Returns:
            One row per set and metric with the columns `set`, `metric`, `difference`, `difference_low`,
            `difference_high` and `n`; empty without a control.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> list(result.beyond_control().columns)
            ['set', 'metric', 'difference', 'difference_low', 'difference_high', 'n']
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
        """Compute the relative change of the MLP coefficients, with 95 % intervals.

        Returns:
            One row per target, set and layer with the columns `target`, `set`, `layer`, `value`, `low`, `high` and
            `n`; empty for a mixture of experts.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> len(result.coefficient_curve())  # 2 targets, 2 sets, 8 layers
            32
        """
        rows = []
        for (target, name, layer), cell in self._coefficients.groupby(["target", "set", "layer"], sort=False):
            cell = cell.sort_values("example_index")
            bootstrap = Bootstrap(cell["group"].tolist(), seed=self.configuration["seed"])
            mean = bootstrap.mean(cell["relative_change"].to_numpy(np.float64))
            rows.append({"target": target, "set": name, "layer": layer} | _interval(mean))
        return pd.DataFrame(rows, columns=["target", "set", "layer", "value", "low", "high", "n"])

    def selectivity(self) -> pd.DataFrame:
        """Compute the relative change of the coefficients on forget prompts divided by that on retain prompts.

        A selectivity of 1 means that the coefficients change as much on retain prompts as on forget prompts.

        Returns:
            One row per target, retain set and layer with the columns `target`, `set`, `layer`, `selectivity`,
            `selectivity_low`, `selectivity_high` (95 %) and `n`; empty for a mixture of experts.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> len(result.selectivity())  # 2 targets, 8 layers
            16
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
        """Return the numbers that a paper quotes, as plain data; `summary.json` holds the same.

        Returns:
            Configuration, names of models and data, and the tables of this result as lists of rows.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> result.summary()["control"]
            'demo:never'
        """
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
        """Draw every score by set and model, with 95 % intervals.

        Returns:
            The figure.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> len(result.figure().data) > 0
            True
        """
        from dissect.behaviour.figures import means_figure

        return means_figure(self.means(), title=self.title)

    def coefficient_figure(self) -> "go.Figure":
        """Draw the relative change of the MLP coefficients by layer: one line per set, dashed for the control.

        Returns:
            The figure.

        Examples:
            >>> from dissect import behave, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
            >>> len(result.coefficient_figure().data) > 0
            True
        """
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
    """Load a finished run of `dissect behave`.

    Runs written by earlier versions get the present names of sets.

    Args:
        path: Run directory.

    Returns:
        The result.

    Raises:
        InputError: The directory holds no finished run of `dissect behave`, or a table cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from dissect import behave, load_behave, load_pair, load_prompts
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
        >>> with TemporaryDirectory() as out:
        ...     computed = behave(pair, forget, retain, max_new_tokens=8, out=out, progress=False)
        ...     loaded = load_behave(out)
        >>> loaded.means().equals(computed.means())
        True
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
    if metric == "empty":
        return (cell[f"text{suffix}"].str.strip() == "").to_numpy(np.float64)
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
    # The id of a record without one is its number, which must not pair examples of different files.
    return [
        Example("" if name == str(index) else name, group)
        for name, index, group in zip(cell["example"], cell["example_index"], cell["group"], strict=True)
    ]


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
