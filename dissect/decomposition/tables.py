"""Print the tables of `dissect decompose`."""

from typing import Any

import pandas as pd
from rich import box
from rich.table import Column, Table

from dissect.decomposition.result import DecompositionResult
from dissect.decomposition.terms import EXACT, TOTAL
from dissect.sweeps.tables import interval
from unlearning.common.terminal import console

_KEYS = ["site", "first_layer", "last_layer"]

_SHORT = {"coefficient": "coef.", "interaction": "inter.", TOTAL: "all three"}
"""Names of terms that would not fit into 80 columns."""


def print_decomposition(result: DecompositionResult) -> None:
    """Print shares and KRS per layer and for all layers, then how to read them."""
    _print_layers(result)
    _print_all_layers(result, "share", "share of the change")
    _print_all_layers(result, "krs", "KRS")
    _print_reading(result)


def _print_layers(result: DecompositionResult) -> None:
    """Print a table per site: shares of each layer's change by term, and KRS (in parentheses minus control)."""
    curve = result.curve()
    krs, share = (_lookup(curve, ["arm", *_KEYS, "term"], value) for value in ("krs", "share"))
    net = " (minus control)" if "control" in result.arms else ""
    for site in result.configuration["sites"]:
        table = Table(
            Column("layer", no_wrap=True),
            *(Column(_SHORT.get(term, term), justify="right") for term in EXACT),
            *(Column(name, justify="right", no_wrap=True) for name in ("weight", _SHORT["coefficient"], _SHORT[TOTAL])),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{result.title}, {site}: shares of change | KRS{net}",
            title_justify="left",
        )
        for first, last in curve[["first_layer", "last_layer"]].drop_duplicates().itertuples(index=False):
            cells = [f"{share['main', site, first, last, term]:.2f}" for term in EXACT]
            for term in ("weight", "coefficient", "total"):
                ours, theirs = (krs.get((arm, site, first, last, term)) for arm in ("main", "control"))
                cells.append(f"{ours:.2f}" + ("" if ours is None or theirs is None else f" ({ours - theirs:+.2f})"))
            table.add_row(str(first) if first == last else "all", *cells)
        console().print(table)


def _print_all_layers(result: DecompositionResult, value: str, label: str) -> None:
    """Print a value of all layers together, with intervals, and its difference to the other arms."""
    curve, contrast = result.curve(), result.contrast()
    others = list(contrast["against"].unique())
    table = Table(
        Column("in all layers", no_wrap=True),
        label,
        *(f"minus {arm}" for arm in others),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    last = curve["last_layer"].max()
    for site in result.configuration["sites"]:
        for term in (*EXACT, TOTAL) if value == "krs" else EXACT:
            here = [
                table[(table["site"] == site) & (table["term"] == term) & (table["first_layer"] == 0)]
                for table in (curve, contrast)
            ]
            ours, theirs = (rows[rows["last_layer"] == last] for rows in here)
            cells = [interval(row, value) for _, row in ours[ours["arm"] == "main"].iterrows()]
            table.add_row(
                f"{site} {_SHORT.get(term, term)}", *cells, *(interval(row, value) for _, row in theirs.iterrows())
            )
    console().print(table)


def _print_reading(result: DecompositionResult) -> None:
    lines = []
    if "control" in result.arms:
        lines.append("Recovery that the control shows too is no sign of stored knowledge: read the difference.")
    else:
        lines.append(
            "No control: how much each term recovers in a model without the knowledge is unknown. Use --control."
        )
    if not any(arm.startswith("null") for arm in result.arms):
        lines.append(
            "No null models: coefficients take most of any diffuse change of the weights. Use --null 3 to compare."
        )
    n = result.configuration["examples"]
    console().print(
        "\n".join([f"{n} prompts; [95 % intervals]; those of every layer are in figures/decomposition.csv.", *lines]),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _lookup(table: pd.DataFrame, keys: list[str], value: str) -> dict[tuple[Any, ...], float]:
    return dict(zip(zip(*(table[key] for key in keys), strict=True), table[value].tolist(), strict=True))
