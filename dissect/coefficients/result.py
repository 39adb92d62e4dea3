"""What `probe` gives: the tables, their means with intervals, the difference to the controls, the figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dissect.coefficients.changes import CHANGES, last_layers_share
from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.scoring.tidy import named, records
from dissect.scoring.two_samples import Example, TwoSamples
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.runs import read_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go


NO_CHANGE = "the coefficients of base and unlearned are the same at every answer position: no neuron to rank"

_RENAMED = {"unrelated": "retain", "unrelated_sha256": "retain_sha256"}
"""Names in runs of earlier versions, and what they are called now."""


@dataclass(eq=False, kw_only=True)
class ProbeResult(RunResult):
    """A finished probe of the MLP coefficients.

    Attributes:
        frame: one row per intervention, target (`unlearned`, `control`) and example: `prompts` (`forget`,
            `retain`), `intervention` (`neurons` or `scaling`), `selection` (`top`, `random`, `matched`, or the
            layers that are scaled), `k` coefficients replaced, `draw`, `factor` (1 where they are the base's), and the
            columns of a patch: `loss_unlearned`, `loss_intervened`, `krs`, ...; `kl_own` is KL(target before ||
            intervened) per answer token, in nats.
        layers: one row per target, prompts, example and layer; see `coefficient_changes`.
        neurons: the most changed neurons; see `neuron_table`.
        concepts: the named value vectors; see `concept_vectors`. Empty where none are named.
    """

    frame: Copied[pd.DataFrame] = Copied()
    layers: Copied[pd.DataFrame] = Copied()
    neurons: Copied[pd.DataFrame] = Copied()
    concepts: Copied[pd.DataFrame] = Copied()
    _frame: pd.DataFrame = field(init=False, repr=False)
    _layers: pd.DataFrame = field(init=False, repr=False)
    _neurons: pd.DataFrame = field(init=False, repr=False)
    _concepts: pd.DataFrame = field(init=False, repr=False)

    @property
    def targets(self) -> list[str]:
        """`unlearned`, and `control` where there is one."""
        names = set(self._frame["target"])
        return [name for name in ("unlearned", "control") if name in names]

    @property
    def sets(self) -> list[str]:
        """`forget`, and `retain` where there are such prompts."""
        return list(self.configuration["sets"])

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """The examples of each set, in order."""
        found = {}
        for name in self.sets:
            first = self._layers[self._layers["prompts"] == name].drop_duplicates("example_index")
            first = first.sort_values("example_index")
            # Records without an id are numbered, which says nothing about two files.
            named = zip(first["example"], first["example_index"], first["group"], strict=True)
            found[name] = [Example("" if one == str(index) else one, group) for one, index, group in named]
        return found

    @cached_property
    def _bootstraps(self) -> dict[str, Bootstrap]:
        """Of each set."""
        equal, seed = self.configuration["scoring"] == "notebook", self.configuration["seed"]
        groups = {name: [example.group for example in examples] for name, examples in self._examples.items()}
        return {name: Bootstrap(found, seed=seed, equal_groups=equal) for name, found in groups.items()}

    def layer_curve(self) -> pd.DataFrame:
        """How far the coefficients of every layer moved, with 95 % intervals.

        Columns: `target`, `prompts`, `layer`, and of each measurement of `dissect.coefficients.changes` the mean over
        examples, with `_low` and `_high`.
        """
        rows = []
        for (target, prompts, layer), cell in self._layers.groupby(["target", "prompts", "layer"], sort=False):
            cell = cell.sort_values("example_index")
            row = {"target": target, "prompts": prompts, "layer": layer}
            for name in CHANGES:
                row |= named(name, self._bootstraps[str(prompts)].mean(cell[name].to_numpy(np.float64)))
            rows.append(row)
        return pd.DataFrame(rows)

    def selectivity(self) -> pd.DataFrame:
        """Relative change on forget prompts divided by that on retain prompts, per target and layer.

        1: knowledge that was to stay is changed as much as knowledge that was to go. Columns: `target`, `layer`,
        `selectivity` with its `_low` and `_high`; empty where there are no retain prompts.
        """
        rows = []
        if "retain" in self.sets:
            samples = TwoSamples(self._examples["forget"], self._examples["retain"], seed=self.configuration["seed"])
            for (target, layer), cell in self._layers.groupby(["target", "layer"], sort=False):
                ours, theirs = (
                    cell[cell["prompts"] == name].sort_values("example_index")["relative_change"].to_numpy(np.float64)
                    for name in ("forget", "retain")
                )
                place = {"target": target, "layer": layer}
                rows.append(place | named("selectivity", samples.ratio(ours, theirs)))
        columns = ["target", "layer", "selectivity", "selectivity_low", "selectivity_high"]
        return pd.DataFrame(rows, columns=columns)

    def shares(self) -> pd.DataFrame:
        """Share of the total squared change in the last k layers; see `last_layers_share`, per target and prompts."""
        frames = []
        for (target, prompts), cell in self._layers.groupby(["target", "prompts"], sort=False):
            frame = last_layers_share(cell, seed=self.configuration["seed"])
            frames.append(frame.assign(target=str(target), prompts=str(prompts)))
        return pd.concat(frames, ignore_index=True)

    def curve(self) -> pd.DataFrame:
        """KRS when k neurons are put back, per target and selection, with 95 % intervals.

        An example's KRS under `random` and `matched` neurons is its mean over the draws. Columns: `target`,
        `selection`, `k`, `share` of all neurons, `krs`, `logprob` (of the answer, nats per token) with their
        intervals, `draws`, and `n` examples with a KRS.
        """
        return self._curve.copy()

    @cached_property
    def _curve(self) -> pd.DataFrame:
        bootstrap = self._bootstraps["forget"]
        rows = []
        for (target, selection, k), table in self._neuron_cells.items():
            estimate = bootstrap.mean(table["krs"].to_numpy(np.float64))
            rows.append(
                {"target": target, "selection": selection, "k": k, "share": k / self._n_neurons}
                | named("krs", estimate)
                | named("logprob", bootstrap.mean(table["logprob_intervened"].to_numpy(np.float64)))
                | {"draws": int(table["draws"].iloc[0]), "n": estimate.n}
            )
        return pd.DataFrame(rows)

    @cached_property
    def _neuron_cells(self) -> dict[tuple[str, str, int], pd.DataFrame]:
        """Per target, selection and k each example's means over the draws."""
        ours = self._frame[self._frame["intervention"] == "neurons"]
        keys = ["target", "selection", "k"]
        means = ours.groupby([*keys, "example_index"], sort=True).agg(
            krs=("krs", "mean"), logprob_intervened=("logprob_intervened", "mean"), draws=("draw", "nunique")
        )
        return {key: cell for key, cell in means.groupby(level=keys, sort=False)}  # type: ignore[misc]

    @property
    def _n_neurons(self) -> int:
        return int(self._frame.loc[self._frame["intervention"] == "neurons", "k"].max())

    def contrasts(self) -> pd.DataFrame:
        """KRS of the top k neurons minus that of its controls, per k, paired over examples, with 95 % intervals.

        Columns: `k`, `against` (`random` and `matched` neurons in the same model, and `control`: the same top k put
        into the control), `difference` with its `_low` and `_high`, `n`.
        """
        bootstrap, cells = self._bootstraps["forget"], self._neuron_cells
        rows = []
        for (target, selection, k), table in cells.items():
            against = "control" if target == "control" and selection == "top" else selection
            if (target, selection) in (("unlearned", "top"), ("control", "random"), ("control", "matched")):
                continue
            ours = cells["unlearned", "top", k]["krs"].to_numpy(np.float64)
            estimate = bootstrap.mean(ours - table["krs"].to_numpy(np.float64))
            rows.append({"k": k, "against": against} | named("difference", estimate) | {"n": estimate.n})
        return pd.DataFrame(rows, columns=["k", "against", "difference", "difference_low", "difference_high", "n"])

    def beyond_control(self) -> int | None:
        """The smallest k from which on the top k give more than they give the control: every interval above 0.

        None where there is no control, or where all neurons together do not give more either.
        """
        table = self.contrasts()
        ours = table[table["against"] == "control"].sort_values("k", ascending=False)
        n_above = int((ours["difference_low"] > 0).cumprod().sum())
        return None if n_above == 0 else int(ours["k"].iloc[n_above - 1])

    def half(self) -> pd.DataFrame:
        """How few numbers hold the knowledge back: the smallest k whose KRS is half of that of all neurons.

        Columns: `target`, `selection`, `k_half` (among the k that were tried; NaN where none reaches it, or where
        all neurons together bring nothing back), its `share` of all neurons, `krs_half` (the KRS there) and `krs_all`.
        """
        curve = self.curve()
        rows = []
        for target in self.targets:
            ours = curve[curve["target"] == target]
            whole = float(ours.loc[ours["k"] == self._n_neurons, "krs"].iloc[0])
            for selection in ("top", "matched", "random"):
                line = ours[ours["selection"] == selection].sort_values("k")
                reached = line[line["krs"] >= whole / 2] if whole > 0 else line[:0]
                first = reached.iloc[0] if len(reached) else {"k": np.nan, "share": np.nan, "krs": np.nan}
                found = {"k_half": float(first["k"]), "share": first["share"], "krs_half": first["krs"]}
                rows.append({"target": target, "selection": selection, **found, "krs_all": whole})
        return pd.DataFrame(rows)

    def scaling(self) -> pd.DataFrame:
        """The last layers' coefficients moved towards the base's by a factor: recovery and damage.

        Columns: `target`, `prompts`, `factor`, and with intervals `krs`, `logprob` (of the answer, nats per token),
        `kl_own` (KL of the output from the same model's unscaled one, nats per answer token: the damage, on retain
        prompts) and `kl_base` (KL from the base's output), `n` examples with a KRS.
        """
        names = {"krs": "krs", "logprob": "logprob_intervened", "kl_own": "kl_own", "kl_base": "kl_intervened"}
        scaled = self._frame[self._frame["intervention"] == "scaling"]
        rows = []
        for (target, prompts, factor), cell in scaled.groupby(["target", "prompts", "factor"], sort=True):
            cell = cell.sort_values("example_index")
            bootstrap = self._bootstraps[str(prompts)]
            row = {"target": target, "prompts": prompts, "factor": factor}
            estimates = {name: bootstrap.mean(cell[column].to_numpy(np.float64)) for name, column in names.items()}
            for name, estimate in estimates.items():
                row |= named(name, estimate)
            rows.append(row | {"n": estimates["krs"].n})
        return pd.DataFrame(rows)

    def undefined(self) -> pd.DataFrame:
        """How many examples have no KRS, per target, prompts and reason."""
        first = self._frame.drop_duplicates(["target", "prompts", "example_index"])
        reasons = first[first["undefined"] != ""]
        return reasons.groupby(["target", "prompts", "undefined"], sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """The numbers a paper quotes, as plain data."""
        return {
            "configuration": self.configuration,
            **self.provenance,
            "layers": records(self.layer_curve()),
            "selectivity": records(self.selectivity()),
            "last_layers_share": records(self.shares()),
            "neurons": records(self._neurons),
            "no_neurons": NO_CHANGE if self._neurons.empty else "",
            "restored": records(self.curve()),
            "contrasts": records(self.contrasts()),
            "half": records(self.half()),
            "beyond_control": self.beyond_control(),
            "scaling": records(self.scaling()),
            "concepts": records(self._concepts),
            "undefined": records(self.undefined()),
        }

    def figure(self) -> "go.Figure":
        """KRS against the number of neurons put back: the most changed, norm-matched and random ones."""
        from dissect.coefficients.figures import neurons_figure

        return neurons_figure(self.curve(), title=self.title)

    def layers_figure(self) -> "go.Figure":
        """Change of the coefficients by layer on forget and retain prompts, and its share in the last layers."""
        from dissect.coefficients.figures import layers_figure

        return layers_figure(self.layer_curve(), self.shares(), title=self.title)

    def scaling_figure(self) -> "go.Figure":
        """Recovery on forget prompts against damage, for every factor."""
        from dissect.coefficients.figures import scaling_figure

        layers = self._frame.loc[self._frame["intervention"] == "scaling", "selection"].iloc[0]
        return scaling_figure(self.scaling(), title=f"{self.title}, {layers} scaled towards the base")

    def figures(self) -> dict[str, "go.Figure"]:
        """Return the figures of the run directory: `neurons`, `layers` and `scaling`."""
        return {"neurons": self.figure(), "layers": self.layers_figure(), "scaling": self.scaling_figure()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that the figures show: `neurons`, `layers` and `scaling`."""
        return {"neurons": self.curve(), "layers": self.layer_curve(), "scaling": self.scaling()}

    def _files(self) -> dict[str, pd.DataFrame]:
        beside = {"layers": self._layers, "neurons": self._neurons, "concepts": self._concepts}
        return {RESULTS: self._frame} | {name: table for name, table in beside.items() if len(table)}


def load_probe(path: str | Path) -> ProbeResult:
    """Read a finished run directory of `dissect probe`.

    Raises:
        InputError: not such a run directory, not finished, or a table of it is broken.
    """
    path = Path(path)
    common = read_result(path, "probe", renamed=_RENAMED)
    return ProbeResult(
        frame=read_frame(path / "results.parquet").replace({"prompts": _RENAMED}),
        layers=_table(path, "layers").replace({"prompts": _RENAMED}),
        neurons=_table(path, "neurons"),
        concepts=_with_present_names(_table(path, "concepts")),
        **common,
    )


def _with_present_names(concepts: pd.DataFrame) -> pd.DataFrame:
    """Rename the columns of runs written by earlier versions; a measure that such a run lacks is NaN."""
    if "jaccard" not in concepts:
        return concepts
    place = list(concepts).index("jaccard")
    concepts = concepts.rename(columns={"jaccard": "jaccard_norm_unembed"})
    concepts.insert(place, "jaccard_unembed", float("nan"))
    return concepts


def _table(path: Path, name: str) -> pd.DataFrame:
    file = path / f"{name}.parquet"
    return read_frame(file) if file.is_file() else pd.DataFrame()
