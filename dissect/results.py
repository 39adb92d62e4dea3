"""What a layer sweep gives: the table, its means with intervals, the difference to the control, the figures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.intervals import Bootstrap, Estimate
from dissect.runs import open_run, read_record, write_bytes
from unlearning.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dissect.figures import Exported

_PLACE = ["site", "centre", "first_layer", "last_layer"]


@dataclass(eq=False)
class PatchingResult:
    """A finished layer sweep.

    Attributes:
        frame: one row per target, site, centre and example; columns as in DESIGN.md.
        configuration: everything that the numbers depend on.
        provenance: names and paths.
        wall_time_s: seconds that the sweep took.
        measured: what else the run measured of itself, as peak memory.
    """

    frame: pd.DataFrame
    configuration: dict[str, Any]
    provenance: dict[str, Any]
    wall_time_s: float
    measured: dict[str, Any] = field(default_factory=dict)
    _curve: pd.DataFrame | None = field(default=None, init=False, repr=False)

    @property
    def targets(self) -> list[str]:
        """`unlearned`, and `control` where there is one."""
        return list(self.frame["target"].unique())

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        first = self.frame[self.frame["target"] == "unlearned"].drop_duplicates("example_index")
        return Bootstrap(
            first.sort_values("example_index")["group"].tolist(),
            seed=self.configuration["seed"],
            equal_groups=self.configuration["scoring"] == "notebook",
        )

    def curve(self) -> pd.DataFrame:
        """Recovery per target, site and centre, with 95 % intervals.

        Columns: `krs` with `krs_low` and `krs_high` (mean of the examples' ratios, the paper's average), and
        beside it `krs_median`, `krs_ratio_of_means`, `krs_centred`, `logprob_recovery` and `kl_recovery` (ratios
        of means, each with its interval), `n` examples and `n_undefined` among them.
        """
        if self._curve is None:
            rows = [
                dict(zip(["target", *_PLACE], place, strict=True)) | self._statistics(cell)
                for place, cell in self.frame.groupby(["target", *_PLACE], sort=False)
            ]
            self._curve = pd.DataFrame(rows)
        return self._curve

    def _statistics(self, cell: pd.DataFrame) -> dict[str, Any]:
        cell = cell.sort_values("example_index")
        column = {name: cell[name].to_numpy(np.float64) for name in cell.columns if cell[name].dtype == np.float64}
        bootstrap = self._bootstrap
        mean = bootstrap.mean(column["krs"])
        statistics = _named("krs", mean)
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
            statistics |= _named(name, bootstrap.ratio(numerators, defined))
        return statistics | {"n": len(cell), "n_undefined": len(cell) - mean.n}

    def contrast(self) -> pd.DataFrame:
        """KRS of the unlearned model minus KRS of the control, per site and centre, paired over examples.

        Activations taken from the base carry the answer even into a model that never knew it: only what the
        unlearned model recovers beyond the control can come from itself. Empty where there is no control.
        """
        if "control" not in self.targets:
            return pd.DataFrame(columns=[*_PLACE, "difference", "difference_low", "difference_high", "n"])
        keys = [*_PLACE, "example_index"]
        ours, theirs = (
            self.frame.loc[self.frame["target"] == target, [*keys, "krs"]] for target in ("unlearned", "control")
        )
        wide = ours.merge(theirs, on=keys, suffixes=("", "_control"))
        rows = []
        for place, cell in wide.groupby(_PLACE, sort=False):
            cell = cell.sort_values("example_index")
            estimate = self._bootstrap.mean((cell["krs"] - cell["krs_control"]).to_numpy(np.float64))
            rows.append(dict(zip(_PLACE, place, strict=True)) | _named("difference", estimate) | {"n": estimate.n})
        return pd.DataFrame(rows)

    def peaks(self) -> pd.DataFrame:
        """Per site: the centre where the unlearned model's KRS is highest, and what the control has there."""
        curve, contrast = self.curve(), self.contrast()
        ours = curve[curve["target"] == "unlearned"].dropna(subset="krs")
        rows = []
        for site in ours["site"].unique():
            peak = ours.loc[ours[ours["site"] == site]["krs"].idxmax()]
            row = {key: peak[key] for key in [*_PLACE, "krs", "krs_low", "krs_high", "logprob_recovery"]}
            here = (curve["site"] == site) & (curve["centre"] == peak["centre"])
            for _, control in curve[here & (curve["target"] == "control")].iterrows():
                row |= {f"control_{key}": control[key] for key in ("krs", "krs_low", "krs_high")}
            for _, gap in contrast[(contrast["site"] == site) & (contrast["centre"] == peak["centre"])].iterrows():
                row |= {key: gap[key] for key in ("difference", "difference_low", "difference_high")}
            rows.append(row)
        return pd.DataFrame(rows)

    def undefined(self) -> pd.DataFrame:
        """How many examples have no KRS, per target and reason."""
        first = self.frame.drop_duplicates(["target", "example_index"])
        reasons = first[first["undefined"] != ""]
        return reasons.groupby(["target", "undefined"], sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """The numbers a paper quotes, as plain data: per site the peak, per target the losses, what is undefined."""
        first = self.frame.drop_duplicates(["target", "example_index"])
        losses = first.groupby("target", sort=False)[["loss_unlearned", "logprob_unlearned", "logprob_base"]].mean()
        return {
            "configuration": self.configuration,
            **self.provenance,
            "examples": int(first["example_index"].nunique()),
            "peaks": _records(self.peaks()),
            "curve": _records(self.curve()),
            "contrast": _records(self.contrast()),
            "targets": _records(losses.reset_index()),
            "undefined": _records(self.undefined()),
        }

    def figure(self) -> "go.Figure":
        """KRS against the window's centre, one line per site, the control dashed."""
        from dissect.figures import recovery_figure

        return recovery_figure(self.curve(), title=self.title)

    def heatmap(self) -> "go.Figure":
        """KRS of every example in every window, one panel per site."""
        from dissect.figures import example_heatmap

        return example_heatmap(self.frame, title=self.title)

    @property
    def title(self) -> str:
        """`base -> unlearned, window 5`."""
        base, unlearned = (str(self.provenance[name]) for name in ("base", "unlearned"))
        if os.sep in base and os.sep in unlearned:  # two directories: their last parts tell them apart
            base, unlearned = os.path.basename(base.rstrip(os.sep)), os.path.basename(unlearned.rstrip(os.sep))
        return f"{base} → {unlearned}, window {self.configuration['window']}"

    def save(self, path: str | Path, *, formats: Sequence[str] = ("html",)) -> Path:
        """Write the run directory of DESIGN.md: tables, summary and figures.

        Raises:
            InputError: the directory holds something else, or cannot be written.
        """
        run = open_run(path, self.configuration, self.provenance)
        if not run.is_complete:
            run.finish(self.frame, self.summary(), wall_time_s=self.wall_time_s, measured=self.measured)
        self.save_figures(run.path, formats=formats)
        return run.path

    def save_figures(self, path: Path, *, formats: Sequence[str] = ("html",)) -> "Exported":
        """Write the figures into `path/figures`: the curve (and its table as csv) and the examples' heat map."""
        from dissect.figures import Exported, export

        written: list[Path] = []
        problem = None
        for name, figure in (("krs", self.figure()), ("examples", self.heatmap())):
            exported = export(figure, path / "figures" / name, formats=formats)
            written += exported.paths
            problem = problem or exported.problem
        table = path / "figures" / "krs.csv"
        write_bytes(table, self.curve().to_csv(index=False).encode())
        return Exported((*written, table), problem)


def load_result(path: str | Path) -> PatchingResult:
    """Read a finished run directory.

    Raises:
        InputError: not a run directory, not finished, or its table is broken.
    """
    path = Path(path)
    record = read_record(path)
    if record["status"] != "complete":
        raise InputError(f"{path}: the run is not finished; run the same `dissect patch` command again to go on")
    try:
        frame = pd.read_parquet(path / "results.parquet")
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'results.parquet'}: cannot be read: {str(error).splitlines()[0]}") from None
    provenance = {key: record[key] for key in ("command", "base", "unlearned", "control", "data")}
    return PatchingResult(frame, record["configuration"], provenance, record["wall_time_s"])


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(key): value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
