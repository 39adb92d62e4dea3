"""What a decomposition gives: two tables, means with intervals, the difference to the other arms, the figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.scoring.tidy import named, records, with_mean_null
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.runs import read_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go


_ARM = ["arm", "target"]
_PLACE = ["site", "first_layer", "last_layer", "term"]


@dataclass(eq=False, kw_only=True)
class DecompositionResult(RunResult):
    """A finished decomposition.

    Attributes:
        frame: one row per arm (`main`, `control`, `null-0`), site, place (a layer, or all of them), term and example;
            norms, shares and direct contributions are means over the example's answer positions.
        positions: the same per answer position, without the scores of whole answers; `position` counts from the
            first scored one, `token` is the one that it predicts.
    """

    frame: Copied[pd.DataFrame] = Copied()
    positions: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)
    _positions: pd.DataFrame = field(init=False, repr=False)

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

    @cached_property
    def _curve(self) -> pd.DataFrame:
        rows = [
            dict(zip([*_ARM, *_PLACE], place, strict=True)) | self._statistics(cell)
            for place, cell in self._with_mean_null.groupby([*_ARM, *_PLACE], sort=False)
        ]
        return pd.DataFrame(rows)

    @cached_property
    def _with_mean_null(self) -> pd.DataFrame:
        """The table with the null models as one arm."""
        keys = ["target", "kind", *_PLACE, "example", "example_index", "group", "n_answer_tokens"]
        return with_mean_null(self._frame, keys)

    def curve(self) -> pd.DataFrame:
        """Every number per arm, site, place and term, with 95 % intervals (`_low`, `_high`).

        Columns: `krs`, `share` (means of the examples' values), `krs_ratio_of_means`, `share_pooled` (ratios of
        means, which large changes dominate), `logprob_recovery`, `kl_recovery`, `relative_norm` (of the base's
        output there), `direct` and `direct_centred` in logits, `n` examples, `n_undefined` without KRS and
        `n_share_undefined` without a share. Null models are one arm, `null`, their mean for every example.
        """
        return self._curve.copy()

    def _statistics(self, cell: pd.DataFrame) -> dict[str, Any]:
        cell = cell.sort_values("example_index")
        column = {name: cell[name].to_numpy(np.float64) for name in cell.columns if cell[name].dtype == np.float64}
        defined = ~np.isnan(column["krs"])

        def lost(name: str) -> np.ndarray:
            return np.where(defined, column[name], np.nan)

        draws = self._bootstrap
        krs, share = draws.mean(column["krs"]), draws.mean(column["share"])
        before, after = column["loss_unlearned"], column["loss_intervened"]
        estimates = {
            "krs": krs,
            "krs_ratio_of_means": draws.ratio(before - after, lost("loss_unlearned")),
            "logprob_recovery": draws.ratio(
                column["logprob_intervened"] - column["logprob_unlearned"],
                lost("logprob_base") - column["logprob_unlearned"],
            ),
            "kl_recovery": draws.ratio(column["kl_unlearned"] - column["kl_intervened"], lost("kl_unlearned")),
            "share": share,
            "share_pooled": draws.ratio(
                column["dot_total"], np.where(np.isnan(column["share"]), np.nan, column["square_total"])
            ),
            "relative_norm": draws.ratio(column["norm"], column["base_norm"]),
            "direct": draws.mean(column["direct"]),
            "direct_centred": draws.mean(column["direct_centred"]),
        }
        statistics = {
            key: value for name, estimate in estimates.items() for key, value in named(name, estimate).items()
        }
        return statistics | {
            "n": len(cell),
            "n_undefined": len(cell) - krs.n,
            "n_share_undefined": len(cell) - share.n,
        }

    def contrast(self) -> pd.DataFrame:
        """The unlearned model minus the arm that `against` names, per site, place and term, paired over examples.

        Columns: the differences of `krs`, `share` and `direct_centred`, each with its interval and its `n_`. What a
        term gives the `control`, which never knew, is no sign of knowledge; what the `null` models have is what any
        diffuse change of that size looks like. Empty where there is neither.
        """
        scores = ["krs", "share", "direct_centred"]
        table = self._with_mean_null
        keys = [*_PLACE, "example_index"]
        ours = table.loc[table["arm"] == "main", [*keys, *scores]]
        rows = []
        for arm in table["arm"].unique():
            if arm == "main":
                continue
            wide = ours.merge(table.loc[table["arm"] == arm, [*keys, *scores]], on=keys, suffixes=("", "_there"))
            for place, cell in wide.groupby(_PLACE, sort=False):
                cell = cell.sort_values("example_index")
                row = {"against": arm} | dict(zip(_PLACE, place, strict=True))
                for score in scores:
                    estimate = self._bootstrap.mean((cell[score] - cell[f"{score}_there"]).to_numpy(np.float64))
                    row |= named(score, estimate) | {f"n_{score}": estimate.n}
                rows.append(row)
        names = [key for score in scores for key in (score, f"{score}_low", f"{score}_high", f"n_{score}")]
        return pd.DataFrame(rows, columns=["against", *_PLACE, *names])

    def undefined(self) -> pd.DataFrame:
        """How many examples lack a number, per arm, site, place, number and reason."""
        one = self._frame.drop_duplicates(["arm", "site", "first_layer", "last_layer", "example_index"])
        long = one.rename(columns={"undefined": "krs_undefined"}).melt(
            ["arm", "site", "first_layer", "last_layer"],
            ["krs_undefined", "share_undefined", "direct_undefined"],
            var_name="number",
            value_name="reason",
        )
        long["number"] = long["number"].str.removesuffix("_undefined")
        keys = ["arm", "site", "first_layer", "last_layer", "number", "reason"]
        return long[long["reason"] != ""].groupby(keys, sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """The numbers a paper quotes, as plain data."""
        first = self._frame.drop_duplicates(["arm", "example_index"])
        losses = first.groupby(_ARM, sort=False)[["loss_unlearned", "logprob_unlearned", "logprob_base"]].mean()
        return {
            "configuration": self.configuration,
            **self.provenance,
            "examples": int(first["example_index"].nunique()),
            "curve": records(self.curve()),
            "contrast": records(self.contrast()),
            "arms": records(losses.reset_index()),
            "undefined": records(self.undefined()),
        }

    def figure(self) -> "go.Figure":
        """KRS of each term per layer, a panel per site, the other arms dashed."""
        from dissect.decomposition.figures import krs_figure

        return krs_figure(self.curve(), title=self.title)

    def shares_figure(self) -> "go.Figure":
        """Each term's share of the change per layer, a panel per site, the other arms dashed."""
        from dissect.decomposition.figures import shares_figure

        return shares_figure(self.curve(), title=self.title)

    def direct_figure(self) -> "go.Figure":
        """Each term's direct contribution to the answer's logit per layer, a panel per site."""
        from dissect.decomposition.figures import direct_figure

        return direct_figure(self.curve(), title=self.title)

    def figures(self) -> dict[str, "go.Figure"]:
        """Return the figures of the run directory: `krs`, `shares` and, where there is a direct path, `direct`."""
        figures = {"krs": self.figure(), "shares": self.shares_figure()}
        return figures | ({"direct": self.direct_figure()} if self._frame["direct"].notna().any() else {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the table that the figures show, `decomposition`."""
        return {"decomposition": self.curve()}

    def _files(self) -> dict[str, pd.DataFrame]:
        return {RESULTS: self._frame, "positions": self._positions}


def load_decompose(path: str | Path) -> DecompositionResult:
    """Read a finished run directory of `decompose`.

    Raises:
        InputError: not a run directory, of another command, not finished, or a table is broken.
    """
    path = Path(path)
    common = read_result(path, "decompose")
    frame, positions = (read_frame(path / f"{name}.parquet") for name in (RESULTS, "positions"))
    return DecompositionResult(frame=frame, positions=positions, **common)
