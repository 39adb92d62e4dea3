"""What a layer sweep gives: the table, its means with intervals, the difference to the control, the figures."""

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
    """A finished layer sweep.

    Attributes:
        frame: one row per arm, site, window and example; columns as in DESIGN.md.
    """

    frame: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)

    @property
    def arms(self) -> list[str]:
        """`main`, and those that it is compared with."""
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
        """Recovery per arm, site and window, with 95 % intervals; null models are one arm, `null`, their mean.

        Columns: `krs` with `krs_low` and `krs_high` (mean of the examples' ratios, the paper's average), and
        beside it `krs_median`, `krs_ratio_of_means`, `krs_centred`, `logprob_recovery` and `kl_recovery` (ratios
        of means, each with its interval), `n` examples and `n_undefined` among them.
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
        """The table with the null models as one arm."""
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
            # Where the models agree on an example there is nothing to recover, in any score.
            defined = np.where(np.isnan(column["krs"]), np.nan, denominators)
            statistics |= named(name, bootstrap.ratio(numerators, defined))
        return statistics | {"n": len(cell), "n_undefined": len(cell) - mean.n}

    def contrast(self) -> pd.DataFrame:
        """KRS of the main arm minus that of every other arm, per site and window, paired over examples.

        Activations taken from the base carry the answer even into a model that never knew it: only what the
        unlearned model recovers beyond the control can come from itself; what it recovers beyond the null is more
        than any change of that size shows, and beyond another donor, more than any patch does. Columns `arm`,
        `target` and `donor` say what is subtracted: `control`, `null`, `other-question`, `noise` or `donor`. Empty
        where there is no other arm.
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
        """Per site and kind of window: where the main arm's KRS is highest, and what the other arms have there.

        `difference` is KRS minus the control's; `minus_null`, `minus_noise` and so on are minus the other arms'.
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
        """How many examples have no KRS, per arm and reason."""
        first = self._frame.drop_duplicates(["arm", "example_index"])
        reasons = first[first["undefined"] != ""]
        return reasons.groupby(["arm", "undefined"], sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """The numbers a paper quotes, as plain data: per site the peaks, per arm the losses, what is undefined."""
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
        """KRS against the window's centre: a panel per kind of window, a line per site, the other arms dashed."""
        from dissect.sweeps.figures import recovery_figure

        return recovery_figure(self.curve(), title=self.title, legend=self._legend)

    def difference_figure(self) -> "go.Figure":
        """KRS minus that of the control, of the null models, and of other donors: what a claim may rest on."""
        from dissect.sweeps.figures import difference_figure

        return difference_figure(self.contrast(), title=self.title, legend=self._legend)

    def heatmap(self) -> "go.Figure":
        """KRS of every example in every window, one panel per site."""
        from dissect.sweeps.figures import example_heatmap

        return example_heatmap(self._frame, title=self.title)

    @property
    def _legend(self) -> str:
        """What the lines of figures have in common."""
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
    """Read a finished run directory.

    Raises:
        InputError: not a run directory, not finished, or its table is broken.
    """
    path = Path(path)
    common = read_result(path, "patch", "restore")
    return SweepResult(frame=read_frame(path / "results.parquet"), **common)


def column_name(arm: str) -> str:
    """An arm's name in columns, as `other_question`."""
    return arm.replace("-", "_")


def difference_name(arm: str) -> str:
    """The column of what is left when an arm is subtracted."""
    return "difference" if arm == "control" else f"minus_{column_name(arm)}"


def _at(table: pd.DataFrame, site: str, kind: str, centre: int) -> pd.DataFrame:
    """The rows of one site and window."""
    return table[(table["site"] == site) & (table["window"] == kind) & (table["centre"] == centre)]
