"""The findings of `analyses.muse_runs` as a table and as curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KINDS = {"scal": "scalability: one forget set of each size", "sust": "sustainability: one request after the other"}
SHOWN = {
    "forget_verbmem": "VerbMem, forget",
    "forget_knowmem": "KnowMem, forget",
    "retain_knowmem": "KnowMem, retain",
    "privleak": "PrivLeak",
}


def table(frame: "pd.DataFrame", commands: Sequence[str]) -> str:
    """Write one line per model, its metrics with their intervals, as Markdown, and the commands below them."""
    shown = {metric: label for metric, label in SHOWN.items() if metric in set(frame["metric"])}
    head = ["run", "documents", "seen before", *shown.values(), "steps", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for name, rows in frame.groupby("run", sort=False):
        by_metric = {row["metric"]: row for row in rows.to_dict("records")}
        counts, cost = (
            [_count(rows, key) for key in keys] for keys in (("documents", "repeated"), ("steps", "seconds"))
        )
        cells = [_cell(by_metric[metric]) if metric in by_metric else "" for metric in shown]
        lines.append("| " + " | ".join([str(name), *counts, *cells, *cost]) + " |")
    told = "ROUGE-L F1 from 0 to 1, PrivLeak in percent; 95 % intervals over MUSE's rows. Utility is KnowMem, retain."
    return "\n".join([*lines, "", told, "", "```", *commands, "```", ""])


def _count(rows: "pd.DataFrame", key: str) -> str:
    value = float(rows[key].iloc[0])
    return "" if value != value else f"{value:.0f}"


def _cell(row: Mapping[Any, Any]) -> str:
    digits = 1 if row["metric"] == "privleak" else 3
    value = f"{row['value']:.{digits}f}"
    return value if row["low"] != row["low"] else f"{value} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def figure(frame: "pd.DataFrame", title: str) -> "go.Figure":
    """Draw one panel per kind of run: what is remembered and kept, against documents forgotten or requests so far.

    Dotted lines are the control's values.

    Args:
        frame: Rows of `findings.csv`.
        title: Title of the figure.

    Returns:
        The figure.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from dissect.plotting import COLOURS, FONT, MARKERS, literal, whiskers

    kinds = [kind for kind in KINDS if kind in set(frame["kind"])]
    metrics = [metric for metric in SHOWN if metric != "privleak" and metric in set(frame["metric"])]
    leaks = "privleak" in set(frame["metric"])
    chart = make_subplots(
        rows=1 + leaks,
        cols=len(kinds),
        subplot_titles=[KINDS[kind] for kind in kinds],
        shared_xaxes="columns",
        shared_yaxes="rows",
        vertical_spacing=0.08,
        horizontal_spacing=0.06,
    )
    retain = frame[frame["kind"] == "retain"].set_index("metric")["value"]
    for column, kind in enumerate(kinds, start=1):
        x = "documents" if kind == "scal" else "number"
        for style, metric in enumerate([*metrics, *(["privleak"] if leaks else [])]):
            row = 2 if metric == "privleak" else 1
            line = frame[(frame["metric"] == metric) & frame["kind"].isin(["start", kind])]
            colour = COLOURS[style % len(COLOURS)]
            chart.add_trace(
                go.Scatter(
                    x=line[x],
                    y=line["value"],
                    error_y=whiskers(line["value"], line["low"], line["high"]),
                    mode="lines+markers",
                    name=SHOWN[metric],
                    legendgroup=metric,
                    showlegend=column == 1,
                    line={"color": colour},
                    marker={"symbol": MARKERS[style % len(MARKERS)], "size": 9},
                ),
                row=row,
                col=column,
            )
            if metric in retain.index and metric != "privleak":
                dotted = {"color": colour, "width": 1, "dash": "dot"}
                chart.add_hline(y=retain[metric], line=dotted, row=row, col=column)
        label = "documents forgotten" if kind == "scal" else "requests so far"
        chart.update_xaxes(title_text=label, row=1 + leaks, col=column)
    chart.update_yaxes(title_text="ROUGE-L F1", range=[-0.02, 1.02], row=1, col=1)
    if leaks:
        chart.update_yaxes(title_text="PrivLeak, %", row=2, col=1)
    chart.update_layout(
        template="simple_white",
        font=FONT,
        title=literal(title),
        width=240 + 420 * len(kinds),
        height=420 + 260 * leaks,
    )
    return chart
