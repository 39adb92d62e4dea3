"""The result of a layer sweep: rows, means with intervals, differences to the other arms, and figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.scoring.tidy import named, pair_title, records, with_mean_null
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.runs import read_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go


_PLACE = ["site", "window", "centre", "first_layer", "last_layer"]
_ARM = ["arm", "target", "donor"]


@dataclass(eq=False, kw_only=True)
class SweepResult(RunResult):
    """The result of `patch` or `restore`.

    Every table that is handed out is a copy.

    Attributes:
        frame: One row per arm, site, window and example: what was intervened on, losses before and after, KRS and the
            other recovery scores (NaN where undefined), and the reason in `undefined`.
    """

    frame: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)

    @property
    def arms(self) -> list[str]:
        """Names of the arms: `main` (the unlearned model), and those that it is compared with."""
        return list(self._frame["arm"].unique())

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        first = self._frame[self._frame["arm"] == "main"].drop_duplicates("example_index")
        return Bootstrap(
            first.sort_values("example_index")["group"].tolist(),
            seed=self.configuration["seed"],
            equal_groups=self.configuration["scoring"] == "notebook",
        )

    def curve(self) -> pd.DataFrame:
        """Return the recovery per arm, site and window, with 95 % intervals.

        Returns:
            `krs` with `krs_low` and `krs_high` (mean of the examples' ratios, the paper's average), and beside it
            `krs_median`, `krs_ratio_of_means`, `krs_centred`, `logprob_recovery` and `kl_recovery` (ratios of means,
            each with its interval), `n` examples and `n_undefined` among them. Null models are one arm, `null`, whose
            values are the mean over the models.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> curve = result.curve()
            >>> len(curve)  # two arms, eight layers
            16
            >>> curve["krs"] *= 100  # a copy: the result stays as it was
            >>> bool(result.curve()["krs"].max() < 2)
            True
        """
        return self._curve.copy()

    @cached_property
    def _curve(self) -> pd.DataFrame:
        keys = [*_ARM, *_PLACE]
        rows = [
            dict(zip(keys, place, strict=True)) | self._statistics(cell)
            for place, cell in self._with_mean_null.groupby(keys, sort=False)
        ]
        return pd.DataFrame(rows)

    @cached_property
    def _with_mean_null(self) -> pd.DataFrame:
        """Rows with the null models merged into one arm."""
        keys = ["target", "donor", "kind", *_PLACE, "example", "example_index", "group", "n_answer_tokens"]
        return with_mean_null(self._frame, keys)

    def _statistics(self, cell: pd.DataFrame) -> dict[str, Any]:
        cell = cell.sort_values("example_index")
        column = {name: cell[name].to_numpy(np.float64) for name in cell.columns if cell[name].dtype == np.float64}
        bootstrap = self._bootstrap
        mean = bootstrap.mean(column["krs"])
        statistics = named("krs", mean)
        statistics["krs_median"] = float(cell["krs"].median())
        pairs = {
            "krs_ratio_of_means": (
                column["loss_unlearned"] - column["loss_intervened"],
                column["loss_unlearned"],
            ),
            "krs_centred": (
                column["centred_loss_unlearned"] - column["centred_loss_intervened"],
                column["centred_loss_unlearned"],
            ),
            "logprob_recovery": (
                column["logprob_intervened"] - column["logprob_unlearned"],
                column["logprob_base"] - column["logprob_unlearned"],
            ),
            "kl_recovery": (column["kl_unlearned"] - column["kl_intervened"], column["kl_unlearned"]),
        }
        for name, (numerators, denominators) in pairs.items():
            # No score is defined for an example on which base and target agree.
            defined = np.where(np.isnan(column["krs"]), np.nan, denominators)
            statistics |= named(name, bootstrap.ratio(numerators, defined))
        return statistics | {"n": len(cell), "n_undefined": len(cell) - mean.n}

    def contrast(self) -> pd.DataFrame:
        """Return the KRS of the main arm minus that of every other arm, per site and window.

        Activations of the base carry the answer even into a model that never knew it: only the recovery beyond the
        control can come from the unlearned model itself. Recovery beyond `null` is more than any change of that size
        shows, and recovery beyond another donor is more than any patch gives.

        Returns:
            `difference` with its 95 % interval, paired over examples, and `n` examples. `arm`, `target` and `donor`
            name the arm that is subtracted: `control`, `null`, `other-question`, `noise` or `donor`. Empty without
            other arms.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> sorted(set(result.contrast()["arm"]))
            ['control']
        """
        return self._contrast.copy()

    @cached_property
    def _contrast(self) -> pd.DataFrame:
        keys = [*_PLACE, "example_index"]
        table = self._with_mean_null
        ours = table.loc[table["arm"] == "main", [*keys, "krs"]]
        rows = []
        for arm in table["arm"].unique():
            if arm == "main":
                continue
            theirs = table.loc[table["arm"] == arm]
            told = {name: theirs[name].iloc[0] for name in _ARM}
            wide = ours.merge(theirs[[*keys, "krs"]], on=keys, suffixes=("", "_there"))
            for place, cell in wide.groupby(_PLACE, sort=False):
                cell = cell.sort_values("example_index")
                estimate = self._bootstrap.mean((cell["krs"] - cell["krs_there"]).to_numpy(np.float64))
                row = told | dict(zip(_PLACE, place, strict=True))
                rows.append(row | named("difference", estimate) | {"n": estimate.n})
        columns = [*_ARM, *_PLACE, "difference", "difference_low", "difference_high", "n"]
        return pd.DataFrame(rows, columns=columns)

    def peaks(self) -> pd.DataFrame:
        """Return the window of the highest KRS per site and kind of window, with the other arms' values there.

        Returns:
            The peak's layers, `krs` with its interval, `logprob_recovery`, each other arm's KRS, and the differences:
            `difference` to the control, `minus_null`, `minus_noise` and so on to the other arms.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> peak = result.peaks().iloc[0]
            >>> peak["site"], peak["window"]
            ('mlp_coef', '3')
        """
        curve, contrast = self.curve(), self.contrast()
        ours = curve[curve["arm"] == "main"].dropna(subset="krs")
        rows = []
        for place, cell in ours.groupby(["site", "window"], sort=False):
            site, kind = map(str, place)
            peak = cell.nlargest(1, "krs").iloc[0]
            row = {key: peak[key] for key in [*_PLACE, "krs", "krs_low", "krs_high", "logprob_recovery"]}
            for _, other in _at(curve, site, kind, peak["centre"]).iterrows():
                if other["arm"] != "main":
                    name = column_name(other["arm"])
                    row |= {f"{name}_{key}": other[key] for key in ("krs", "krs_low", "krs_high")}
            for _, gap in _at(contrast, site, kind, peak["centre"]).iterrows():
                name = difference_name(gap["arm"])
                row |= {f"{name}{end}": gap[f"difference{end}"] for end in ("", "_low", "_high")}
            rows.append(row)
        return pd.DataFrame(rows)

    def undefined(self) -> pd.DataFrame:
        """Return the number of examples without a KRS per arm and reason.

        Returns:
            Columns `arm`, `undefined` (the reason) and `examples`; empty if every example has a KRS.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> len(result.undefined())
            0
        """
        first = self._frame.drop_duplicates(["arm", "example_index"])
        reasons = first[first["undefined"] != ""]
        return reasons.groupby(["arm", "undefined"], sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """Return the numbers that a paper quotes, as plain data: peaks, losses per arm, undefined examples.

        Returns:
            The content of `summary.json`.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> result.summary()["examples"]
            4
        """
        first = self._frame.drop_duplicates(["arm", "example_index"])
        losses = first.groupby(_ARM, sort=False)[["loss_unlearned", "logprob_unlearned", "logprob_base"]].mean()
        return {
            "configuration": self.configuration,
            **self.provenance,
            "examples": int(first["example_index"].nunique()),
            "peaks": records(self.peaks()),
            "curve": records(self.curve()),
            "contrast": records(self.contrast()),
            "arms": records(losses.reset_index()),
            "undefined": records(self.undefined()),
        }

    def figure(self) -> "go.Figure":
        """Draw KRS against the window's centre: a panel per kind of window, a line per site, the other arms dashed.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> len(result.figure().data) > 0
            True
        """
        from dissect.sweeps.figures import recovery_figure

        return recovery_figure(self.curve(), title=self.title, legend=self._legend)

    def difference_figure(self) -> "go.Figure":
        """Draw KRS minus that of the control, of the null models, and of other donors.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> len(result.difference_figure().data) > 0
            True
        """
        from dissect.sweeps.figures import difference_figure

        return difference_figure(self.contrast(), title=self.title, legend=self._legend)

    def heatmap(self) -> "go.Figure":
        """Draw the KRS of every example in every window, one panel per site.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, patch
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = patch(pair, prompts, sites="mlp_coef", window=3, progress=False)
            >>> len(result.heatmap().data)  # one site
            1
        """
        from dissect.sweeps.figures import example_heatmap

        return example_heatmap(self._frame, title=self.title)

    @property
    def _legend(self) -> str:
        """Heading of the figures' legends."""
        done = "patched" if self.configuration["command"] == "patch" else "restored"
        giver = "the base" if self.configuration["direction"] == "base-to-unlearned" else "the unlearned model"
        return f"{done} from {giver}"

    @property
    def title(self) -> str:
        """`base → unlearned`, from the donor to the target."""
        base, unlearned = self.provenance["base"], self.provenance["unlearned"]
        if self.configuration["direction"] != "base-to-unlearned":
            base, unlearned = unlearned, base
        return pair_title({"base": base, "unlearned": unlearned})

    def figures(self) -> dict[str, "go.Figure"]:
        """Return the figures of the run directory: `krs`, `examples` and, with other arms, `difference`."""
        figures = {"krs": self.figure()}
        if len(self._contrast):
            figures["difference"] = self.difference_figure()
        return figures | {"examples": self.heatmap()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that the figures show: `krs` and, with other arms, `difference`."""
        return {"krs": self.curve()} | ({"difference": self.contrast()} if len(self._contrast) else {})

    def _files(self) -> dict[str, pd.DataFrame]:
        return {RESULTS: self._frame}


def load_result(path: str | Path) -> SweepResult:
    """Read a finished run directory of `patch` or `restore`.

    Args:
        path: The run directory.

    Returns:
        The result, as `patch` or `restore` returned it.

    Raises:
        InputError: The directory holds no finished run of these commands, or its table is broken.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from dissect import load_pair, load_prompts, load_result, patch
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> with TemporaryDirectory() as out:
        ...     patched = patch(pair, prompts, sites="mlp_coef", window=3, out=out, progress=False)
        ...     loaded = load_result(out)
        >>> loaded.frame.equals(patched.frame)
        True
    """
    path = Path(path)
    common = read_result(path, "patch", "restore")
    return SweepResult(frame=read_frame(path / "results.parquet"), **common)


def column_name(arm: str) -> str:
    """Return an arm's name in column names, such as `other_question`."""
    return arm.replace("-", "_")


def difference_name(arm: str) -> str:
    """Return the name of the column that holds KRS minus that of an arm."""
    return "difference" if arm == "control" else f"minus_{column_name(arm)}"


def _at(table: pd.DataFrame, site: str, kind: str, centre: int) -> pd.DataFrame:
    """Return the rows of one site and window."""
    return table[(table["site"] == site) & (table["window"] == kind) & (table["centre"] == centre)]
