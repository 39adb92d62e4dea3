"""Print the tables of `dissect behave`."""

import re
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.table import Column, Table

from unlearning.common.terminal import console

if TYPE_CHECKING:
    from dissect.behaviour.result import BehaviourResult

_ROWS = {
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "kl": "KL, nats",
    "exact_match": "exact match",
    "probability": "probability",
    "perplexity": "perplexity",
    "empty": "empty texts",
}
_SHORT = {"base": "base", "unlearned": "unlearned", "control": "control"}


def print_behaviour(result: "BehaviourResult") -> None:
    """Print the means of every set, the difference of forget and retain sets, then how to read them."""
    out = console()
    out.print(_means_table(result))
    out.print(_contrast_table(result))
    for line in _reading(result):
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _means_table(result: "BehaviourResult") -> Table:
    means = result.means()
    table = _table(result.title, Column("score", no_wrap=True), Column("model", no_wrap=True), *result.sets)
    for metric, label in _ROWS.items():
        rows = means[(means["metric"] == metric) & means["value"].notna()]
        for number, model in enumerate(rows["model"].unique()):
            cells = [
                _cell(rows[(rows["model"] == model) & (rows["set"] == name)], "value", "low", "high")
                for name in result.sets
            ]
            table.add_row(label if number == 0 else "", _SHORT[model], *cells)
    return table


def _contrast_table(result: "BehaviourResult") -> Table:
    contrasts = result.contrasts()
    names = list(contrasts["set"].unique())
    table = _table(
        "unlearned, forget minus retain",
        Column("score", no_wrap=True),
        *(header for name in names for header in (name, "delta")),
    )
    ours = contrasts[(contrasts["model"] == "unlearned") & contrasts["difference"].notna()]
    for metric in ours["metric"].unique():
        cells = []
        for name in names:
            row = ours[(ours["metric"] == metric) & (ours["set"] == name)]
            cells.append(_cell(row, "difference", "difference_low", "difference_high"))
            cells.append(_number(float(row["cliffs_delta"].iloc[0])) if len(row) else "")
        label = _ROWS.get(metric, metric.replace("_change", " change").replace("_", " "))
        table.add_row(label, *cells)
    return table


def _reading(result: "BehaviourResult") -> list[str]:
    lines = [
        "[95 % intervals]. BLEU, ROUGE-L and KL compare with the base; a change is the model's score minus the base's; "
        "delta is Cliff's delta. "
        + {
            "none": "The sets have no examples in common and are resampled separately.",
            "ids": "The sets have the same examples: differences are paired.",
            "groups": "The sets have the same groups, which are resampled together.",
        }[str(result.contrasts()["pairing"].iloc[0])]
    ]
    selectivity = result.selectivity()
    last = selectivity[(selectivity["layer"] == selectivity["layer"].max()) & selectivity["selectivity"].notna()]
    for _, row in last.iterrows():
        interval = f"[{_number(row['selectivity_low'])}, {_number(row['selectivity_high'])}]"
        lines.append(
            f"{row['target']}: the last layer's MLP coefficients moved {row['selectivity']:.2f} {interval} times as "
            f"far on forget as on {row['set']} prompts."
        )
    if "control" not in result.targets:
        lines.append(
            "No control: how far a model that was never trained on the forget facts is from the base is unknown. Use "
            "--control."
        )
    return lines


def _table(title: str, *columns: str | Column) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    table.title_justify = "left"
    return table


def _cell(rows: pd.DataFrame, value: str, low: str, high: str) -> str:
    if rows.empty:
        return ""
    row = rows.iloc[0]
    if pd.isna(row[low]):
        return _number(row[value])
    return f"{_number(row[value])} [{_number(row[low])}, {_number(row[high])}]"


def _number(value: float) -> str:
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return re.sub(r"^(-?)0\.", r"\1.", text)  # short enough for two numbers in 80 columns
