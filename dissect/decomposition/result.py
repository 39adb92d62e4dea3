"""The result of a decomposition: two tables, means with intervals, differences to the other arms, and figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.decomposition.terms import OLD_SITES
from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.scoring.tidy import named, records, with_mean_null
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.runs import read_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go


_ARM = ["arm", "target"]
_KEYS = ["site", "first_layer", "last_layer", "term"]


@dataclass(eq=False, kw_only=True)
class DecompositionResult(RunResult):
    """The result of `decompose`.

    Every table that is handed out is a copy.

    Attributes:
        frame: One row per arm (`main`, `control`, `null-0`), site, layer or all layers, term and example; norms, shares
            and direct contributions are means over the example's answer positions.
        positions: The same per answer position, without the scores of whole answers; `position` counts from the first
            scored one, `token` is the token that the position predicts.
    """

    frame: Copied[pd.DataFrame] = Copied()
    positions: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)
    _positions: pd.DataFrame = field(init=False, repr=False)

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

    @cached_property
    def _curve(self) -> pd.DataFrame:
        rows = [
            dict(zip([*_ARM, *_KEYS], place, strict=True)) | self._statistics(cell)
            for place, cell in self._with_mean_null.groupby([*_ARM, *_KEYS], sort=False)
        ]
        return pd.DataFrame(rows)

    @cached_property
    def _with_mean_null(self) -> pd.DataFrame:
        """Rows with the null models merged into one arm."""
        keys = ["target", "kind", *_KEYS, "example", "example_index", "group", "n_answer_tokens"]
        return with_mean_null(self._frame, keys)

    def curve(self) -> pd.DataFrame:
        """Return every number per arm, site, layers and term, with 95 % intervals.

        Returns:
            `krs` and `share` (means of the examples' values), `krs_ratio_of_means` and `share_pooled` (ratios of means,
            dominated by large changes), `logprob_recovery`, `kl_recovery`, `relative_norm` (relative to the base's
            output), `direct` and `direct_centred` in logits, each with `_low` and `_high`; `n` examples, `n_undefined`
            without KRS and `n_share_undefined` without a share. Null models are one arm, `null`, whose values are the
            mean over the models.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> curve = result.curve()
            >>> shares = curve[curve["term"] == "total"]["share"]  # of the whole change
            >>> bool((shares.round(6) == 1).all())
            True
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
        """Return the main arm minus every other arm per site, layers and term, paired over examples.

        Recovery that a term also gives the `control` is no sign of knowledge, and the values of `null` are those of any
        diffuse change of that size.

        Returns:
            `against` (the subtracted arm) and the differences of `krs`, `share` and `direct_centred`, each with its
            interval and its number of examples `n_`. Empty without other arms.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> set(result.contrast()["against"])
            {'control'}
        """
        scores = ["krs", "share", "direct_centred"]
        table = self._with_mean_null
        keys = [*_KEYS, "example_index"]
        ours = table.loc[table["arm"] == "main", [*keys, *scores]]
        rows = []
        for arm in table["arm"].unique():
            if arm == "main":
                continue
            wide = ours.merge(table.loc[table["arm"] == arm, [*keys, *scores]], on=keys, suffixes=("", "_there"))
            for place, cell in wide.groupby(_KEYS, sort=False):
                cell = cell.sort_values("example_index")
                row = {"against": arm} | dict(zip(_KEYS, place, strict=True))
                for score in scores:
                    estimate = self._bootstrap.mean((cell[score] - cell[f"{score}_there"]).to_numpy(np.float64))
                    row |= named(score, estimate) | {f"n_{score}": estimate.n}
                rows.append(row)
        names = [key for score in scores for key in (score, f"{score}_low", f"{score}_high", f"n_{score}")]
        return pd.DataFrame(rows, columns=["against", *_KEYS, *names])

    def undefined(self) -> pd.DataFrame:
        """Return the number of examples without a number per arm, site, layers, number and reason.

        Returns:
            `number` is `krs`, `share` or `direct`, `reason` why it is undefined, `examples` how many examples lack it.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> list(result.undefined().columns[-3:])
            ['number', 'reason', 'examples']
        """
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
        """Return the numbers that a paper quotes, as plain data.

        Returns:
            The content of `summary.json`.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> result.summary()["examples"]
            4
        """
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
        """Draw the KRS of each term per layer, a panel per site, the other arms dashed.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> len(result.figure().data) > 0
            True
        """
        from dissect.decomposition.figures import krs_figure

        return krs_figure(self.curve(), title=self.title)

    def shares_figure(self) -> "go.Figure":
        """Draw each term's share of the change per layer, a panel per site, the other arms dashed.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> len(result.shares_figure().data) > 0
            True
        """
        from dissect.decomposition.figures import shares_figure

        return shares_figure(self.curve(), title=self.title)

    def direct_figure(self) -> "go.Figure":
        """Draw each term's direct contribution to the answer's logit per layer, a panel per site.

        Returns:
            A plotly figure.

        Examples:
            >>> from dissect import decompose, load_pair, load_prompts
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
            >>> len(result.direct_figure().data) > 0
            True
        """
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

    Args:
        path: The run directory.

    Returns:
        The result, as `decompose` returned it; sites go by today's names in runs of earlier versions too.

    Raises:
        InputError: The directory holds no finished run of `decompose`, or a table of it is broken.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from dissect import decompose, load_decompose, load_pair, load_prompts
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> with TemporaryDirectory() as out:
        ...     split = decompose(pair, prompts, sites="mlp_out", out=out, progress=False)
        ...     loaded = load_decompose(out)
        >>> loaded.frame.equals(split.frame)
        True
    """
    path = Path(path)
    common = read_result(path, "decompose", renamed=OLD_SITES)
    frame, positions = (
        read_frame(path / f"{name}.parquet").replace({"site": OLD_SITES}) for name in (RESULTS, "positions")
    )
    return DecompositionResult(frame=frame, positions=positions, **common)
