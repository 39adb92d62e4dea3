"""The result of `probe`: tables, means with intervals, differences to the controls, and figures."""

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


NO_CHANGE = "base and unlearned have the same coefficients at every answer position, so no neuron is ranked"

_RENAMED = {"unrelated": "retain", "unrelated_sha256": "retain_sha256"}
"""Present names by the names in runs of earlier versions."""


@dataclass(eq=False, kw_only=True)
class ProbeResult(RunResult):
    """A finished probe of the MLP coefficients.

    Attributes:
        frame: One row per intervention, target (`unlearned`, `control`) and example: `prompts` (`forget`,
            `retain`), `intervention` (`neurons` or `scaling`), `selection` (`top`, `random`, `matched`, or the
            scaled layers), `k` (number of replaced coefficients), `draw`, `factor` (1 for restored neurons), and the
            columns of a patch: `loss_unlearned`, `loss_intervened`, `krs`, ...; `kl_own` is KL(target before ||
            intervened) per answer token, in nats.
        layers: One row per target, prompts, example and layer; see `coefficient_changes`.
        neurons: The most changed neurons; see `neuron_table`.
        concepts: The concept vectors; see `concept_vectors`. Empty if no concepts were given.
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
        """`unlearned` and, if there is one, `control`."""
        names = set(self._frame["target"])
        return [name for name in ("unlearned", "control") if name in names]

    @property
    def sets(self) -> list[str]:
        """`forget` and, if there are such prompts, `retain`."""
        return list(self.configuration["sets"])

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Examples of each set, in order."""
        found = {}
        for name in self.sets:
            first = self._layers[self._layers["prompts"] == name].drop_duplicates("example_index")
            first = first.sort_values("example_index")
            # The id of a record without one is its number, which must not pair examples of different files.
            named = zip(first["example"], first["example_index"], first["group"], strict=True)
            found[name] = [Example("" if one == str(index) else one, group) for one, index, group in named]
        return found

    @cached_property
    def _bootstraps(self) -> dict[str, Bootstrap]:
        """Bootstrap draws of each set."""
        equal, seed = self.configuration["scoring"] == "notebook", self.configuration["seed"]
        groups = {name: [example.group for example in examples] for name, examples in self._examples.items()}
        return {name: Bootstrap(found, seed=seed, equal_groups=equal) for name, found in groups.items()}

    def layer_curve(self) -> pd.DataFrame:
        """Compute how far the coefficients of every layer moved, with 95 % intervals.

        Returns:
            One row per target, prompts and layer with the columns `target`, `prompts`, `layer`, and the mean over
            examples of every measurement of `dissect.coefficients.changes`, with `_low` and `_high`.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.layer_curve())  # 2 targets, 2 sets of prompts, 8 layers
            32
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
        """Compute the relative change on forget prompts divided by that on retain prompts, per target and layer.

        A selectivity of 1 means that the coefficients change as much on retain prompts as on forget prompts.

        Returns:
            One row per target and layer with the columns `target`, `layer`, `selectivity`, `selectivity_low` and
            `selectivity_high` (95 %); empty without retain prompts.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.selectivity())  # 2 targets, 8 layers
            16
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
        """Compute the share of the total squared change that is in the last k layers, for every k.

        Returns:
            One row per target, prompts and k; for the columns see `dissect.coefficients.changes.last_layers_share`.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> shares = result.shares()
            >>> set(shares[shares["last_layers"] == 8]["share"])  # all layers
            {1.0}
        """
        frames = []
        for (target, prompts), cell in self._layers.groupby(["target", "prompts"], sort=False):
            frame = last_layers_share(cell, seed=self.configuration["seed"])
            frames.append(frame.assign(target=str(target), prompts=str(prompts)))
        return pd.concat(frames, ignore_index=True)

    def curve(self) -> pd.DataFrame:
        """Compute the KRS when k neurons are restored, with 95 % intervals.

        The KRS of an example under `random` or `matched` neurons is the mean over the draws.

        Returns:
            One row per target, selection and k with the columns `target`, `selection`, `k`, `share` (of all neurons),
            `krs` and `logprob` (of the answer, nats per token) with `_low` and `_high`, `draws`, and `n` (examples
            with a KRS).

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> int(result.curve()["k"].max())  # all neurons: 8 layers of 352
            2816
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
        """Means over the draws of every example, by target, selection and k."""
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
        """Compute the KRS of the top k neurons minus that of other interventions, paired over examples.

        Returns:
            One row per k and comparison with the columns `k`, `against` (`random` or `matched`: other neurons in the
            unlearned model; `control`: the same top k in the control), `difference`, `difference_low`,
            `difference_high` (95 %) and `n`.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> sorted(set(result.contrasts()["against"]))
            ['control', 'matched', 'random']
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
        """Return the smallest k from which on the top k neurons recover more than in the control.

        For this k and every larger one, the interval of the difference is above 0.

        Returns:
            The number of neurons; None without a control, or if even all neurons do not recover more than in the
            control.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> k = result.beyond_control()
            >>> k is None or 1 <= k <= 2816
            True
        """
        table = self.contrasts()
        ours = table[table["against"] == "control"].sort_values("k", ascending=False)
        n_above = int((ours["difference_low"] > 0).cumprod().sum())
        return None if n_above == 0 else int(ours["k"].iloc[n_above - 1])

    def half(self) -> pd.DataFrame:
        """Find the smallest k whose KRS is at least half of that of all neurons.

        Returns:
            One row per target and selection with the columns `target`, `selection`, `k_half` (NaN if no k reaches half,
            or if all neurons together recover nothing), `share` (of all neurons), `krs_half` (the KRS at `k_half`) and
            `krs_all`.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> list(result.half().columns)
            ['target', 'selection', 'k_half', 'share', 'krs_half', 'krs_all']
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
        """Compute recovery and damage when the last layers' coefficients are scaled towards the base's.

        Returns:
            One row per target, prompts and factor with the columns `target`, `prompts`, `factor`, and with `_low` and
            `_high` (95 %) `krs`, `logprob` (of the answer, nats per token), `kl_own` (KL of the output from the same
            model's unscaled output, nats per answer token; on retain prompts, the damage) and `kl_base` (KL from the
            base's output); `n` is the number of examples with a KRS.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> sorted(set(result.scaling()["factor"]))
            [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
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
        """Count the examples without a KRS.

        Returns:
            One row per target, prompts and reason with the columns `target`, `prompts`, `undefined` (the reason) and
            `examples`.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.undefined())
            0
        """
        first = self._frame.drop_duplicates(["target", "prompts", "example_index"])
        reasons = first[first["undefined"] != ""]
        return reasons.groupby(["target", "prompts", "undefined"], sort=False).size().reset_index(name="examples")

    def summary(self) -> dict[str, Any]:
        """Return the numbers that a paper quotes, as plain data; `summary.json` holds the same.

        Returns:
            Configuration, names of models and data, and the tables of this result as lists of rows.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> result.summary()["control"]
            'demo:never'
        """
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
        """Draw the KRS against the number of restored neurons: the most changed, norm-matched and random ones.

        Returns:
            The figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.figure().data) > 0
            True
        """
        from dissect.coefficients.figures import neurons_figure

        return neurons_figure(self.curve(), title=self.title)

    def layers_figure(self) -> "go.Figure":
        """Draw the change of the coefficients by layer, and its share in the last layers.

        Returns:
            The figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.layers_figure().data) > 0
            True
        """
        from dissect.coefficients.figures import layers_figure

        return layers_figure(self.layer_curve(), self.shares(), title=self.title)

    def scaling_figure(self) -> "go.Figure":
        """Draw recovery on forget prompts against damage on retain prompts, for every factor.

        Returns:
            The figure.

        Examples:
            >>> from dissect import load_pair, load_prompts, probe
            >>> from dissect.zoo import question_set
            >>> pair = load_pair("demo:base", "demo:npo")
            >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
            >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
            >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
            >>> len(result.scaling_figure().data) > 0
            True
        """
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
    """Load a finished run of `dissect probe`.

    Runs written by earlier versions get the present names of sets and columns.

    Args:
        path: Run directory.

    Returns:
        The result.

    Raises:
        InputError: The directory holds no finished run of `dissect probe`, or a table cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from dissect import load_pair, load_probe, load_prompts, probe
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
        >>> with TemporaryDirectory() as out:
        ...     probed = probe(pair, forget, retain=retain, draws=1, out=out, progress=False)
        ...     loaded = load_probe(out)
        >>> loaded.curve().equals(probed.curve())
        True
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
