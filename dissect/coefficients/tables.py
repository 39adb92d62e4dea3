"""Print the tables of `dissect probe`."""

import re
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.table import Column, Table

from unlearning.common.terminal import console

if TYPE_CHECKING:
    from dissect.coefficients.result import ProbeResult

_MOST_ROWS = 12
_NEURONS, _TOKENS = 5, 6
_FACTORS = (0.5, 1.0, 1.5, 2.0)


def print_probe(result: "ProbeResult") -> None:
    """Print the change by layer, the most changed neurons, recovery and damage, then how to read them."""
    out = console()
    out.print(_layers_table(result))
    if len(result.neurons):
        out.print(_neurons_table(result))
    if result.curve()["krs"].notna().any():
        out.print(_restored_table(result))
        out.print(_scaling_table(result))
    if len(result.concepts):
        out.print(_concepts_table(result))
    for line in _reading(result):
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _layers_table(result: "ProbeResult") -> Table:
    curve, selectivity, shares = result.layer_curve(), result.selectivity(), result.shares()
    n_layers = int(shares["last_layers"].max())
    has_retain = len(selectivity) > 0
    table = _table(f"{result.title}: change of the MLP coefficients", "layer", "forget")
    if has_retain:
        table.add_column("retain")
        for target in result.targets:
            table.add_column("selectivity" if target == "unlearned" else "control's")
    table.add_column("share from here")
    for layer in _some(n_layers):
        here = curve[(curve["layer"] == layer) & (curve["target"] == "unlearned")]
        cells = [str(layer), _cell(here[here["prompts"] == "forget"], "relative_change")]
        if has_retain:
            cells.append(_cell(here[here["prompts"] == "retain"], "relative_change"))
            at = selectivity[selectivity["layer"] == layer]
            cells += [_cell(at[at["target"] == target], "selectivity") for target in result.targets]
        of = shares[(shares["target"] == "unlearned") & (shares["prompts"] == "forget")]
        cells.append(_number(float(of.loc[of["first_layer"] == layer, "share"].iloc[0])))
        table.add_row(*cells)
    return table


def _some(n_layers: int) -> list[int]:
    """Return all layers; of many, about a dozen evenly spaced ones and the last three."""
    step = -(-n_layers // _MOST_ROWS) if n_layers > _MOST_ROWS else 1
    return sorted({*range(0, n_layers, step), *range(max(0, n_layers - 3), n_layers)})


def _neurons_table(result: "ProbeResult") -> Table:
    table = _table(
        "neurons that changed most, and the tokens that they promote", "layer", "neuron", "base", "unlearned"
    )
    table.add_column("tokens", no_wrap=True, overflow="ellipsis")
    for _, row in result.neurons.head(_NEURONS).iterrows():
        tokens = " ".join(repr(token) for token in list(row["promotes"])[:_TOKENS])
        means = [_number(row[name]) for name in ("mean_base", "mean_unlearned")]
        table.add_row(str(row["layer"]), str(row["neuron"]), *means, tokens)
    return table


def _restored_table(result: "ProbeResult") -> Table:
    curve = result.curve()
    columns = [("most changed", "unlearned", "top"), ("norm-matched", "unlearned", "matched")]
    columns.append(("random", "unlearned", "random"))
    if "control" in result.targets:
        columns.append(("most changed, control", "control", "top"))
    table = _table("KRS when the base's coefficients of k neurons are restored", "k", *(one[0] for one in columns))
    ks = sorted(curve["k"].unique())
    for k in ks[-1 : -_MOST_ROWS - 1 : -1][::-1]:
        here = curve[curve["k"] == k]
        cells = [
            _cell(here[(here["target"] == target) & (here["selection"] == selection)], "krs")
            for _, target, selection in columns
        ]
        table.add_row(str(k) if k < ks[-1] else f"all {k}", *cells)
    return table


def _scaling_table(result: "ProbeResult") -> Table:
    scaling = result.scaling()
    layers = result.frame.loc[result.frame["intervention"] == "scaling", "selection"].iloc[0]
    table = _table(f"coefficients of {layers} scaled towards the base's", "factor")
    for target in result.targets:
        table.add_column("KRS, forget" if target == "unlearned" else "control's KRS")
        if "retain" in result.sets:
            table.add_column("damage, retain" if target == "unlearned" else "control's damage")
    for factor in _FACTORS:
        cells = [f"{factor:g}"]
        for target in result.targets:
            here = scaling[(scaling["factor"] == factor) & (scaling["target"] == target)]
            cells.append(_cell(here[here["prompts"] == "forget"], "krs"))
            if "retain" in result.sets:
                cells.append(_cell(here[here["prompts"] == "retain"], "kl_own", digits=4))
        table.add_row(*cells)
    return table


def _concepts_table(result: "ProbeResult") -> Table:
    overlaps = ("Jaccard (unembed)", "Jaccard (norm, unembed)")
    table = _table("concept vectors, base and unlearned", "concept", "layer", "neuron", "cosine", "L2", *overlaps)
    for _, row in result.concepts.iterrows():
        measures = ("cosine", "l2", "jaccard_unembed", "jaccard_norm_unembed")
        numbers = [f"{row[name]:.3f}" for name in measures]
        table.add_row(row["concept"], str(row["layer"]), str(row["neuron"]), *numbers)
    return table


def _reading(result: "ProbeResult") -> list[str]:
    lines = []
    if result.neurons.empty:
        lines.append(f"{result.summary()['no_neurons']}.")
    for _, row in result.half().iterrows():
        if row["selection"] == "top" and not pd.isna(row["k_half"]):
            model = "the unlearned model" if row["target"] == "unlearned" else "the control"
            lines.append(
                f"{model}: restoring all coefficients gives KRS {row['krs_all']:.2f}; half of it is reached with the "
                f"{row['k_half']:.0f} most changed ones ({row['share']:.1%})."
            )
    if "control" in result.targets and result.neurons.size:
        k = result.beyond_control()
        lines.append(
            "Restoring the most changed neurons recovers no more than in the control, even for the largest k."
            if k is None
            else f"Restoring the k most changed neurons recovers more than in the control from k = {k} on."
        )
    lines.append(
        "[95 % intervals]. Change: |m_u - m_b| / |m_b| at the answer positions. Selectivity: change on forget prompts "
        "divided by change on retain prompts. Share from here: part of the squared change on forget prompts that is in "
        "this layer and later ones. Damage: KL from the model's own unscaled output, in nats."
    )
    if "control" not in result.targets:
        lines.append(
            "No control: the base's coefficients carry the answer even into a model that was never trained on it. Use "
            "--control."
        )
    return lines


def _table(title: str, *columns: str) -> Table:
    headers = [Column(name, no_wrap=True) if name in ("layer", "k", "factor") else Column(name) for name in columns]
    table = Table(*headers, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    table.title_justify = "left"
    return table


def _cell(rows: pd.DataFrame, name: str, *, digits: int = 2) -> str:
    if rows.empty:
        return ""
    row: Any = rows.iloc[0]
    if pd.isna(row[f"{name}_low"]):
        return _number(row[name], digits)
    ends = ", ".join(_number(row[f"{name}_{end}"], digits) for end in ("low", "high"))
    return f"{_number(row[name], digits)} [{ends}]"


def _number(value: float, digits: int = 2) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")  # short enough for several numbers in 80 columns
