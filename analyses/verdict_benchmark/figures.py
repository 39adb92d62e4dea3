"""The benchmark's three figures: scores by kind of model, AUROC of every number, and score by true share."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.verdict_benchmark import constructions as making
from analyses.verdict_benchmark.report import ALONE, NET, POWER, VERDICT
from dissect.plotting import COLOURS, FONT, MARKERS, literal, whiskers
from dissect.verdicts.rule import Rule

BROKEN = "broken"
GROUPS = (
    (making.NEVER_KNEW, "#009E73"),
    (making.NEVER_DAMAGED, "#56B4E9"),
    (making.DISTILLED, "#0072B2"),
    (making.BY_A_METHOD, "#D55E00"),
    (making.BY_HAND, "#E69F00"),
    (BROKEN, "#999999"),
)
"""How models that hold all or none of the knowledge were made, with their colours, for the figure of scores."""


TITLES = {"score": "score", "score without control": "score, no control"}
"""Titles of the panels of scores."""


def scores_figure(frame: pd.DataFrame, rule: Rule, *, numbers: Sequence[str]) -> go.Figure:
    """Draw numbers of every model that holds all or none of the knowledge, one panel per number.

    In the panels of scores, dashed lines are the rule's bounds: an interval wholly above the left one is called
    suppressed, an interval wholly below the right one erased.

    Args:
        frame: Table of the judged models, as `analyses.verdict_benchmark.report.judged` returns it.
        rule: The rule with its bounds.
        numbers: Columns of `frame`.

    Returns:
        A plotly figure.
    """
    chart = make_subplots(
        1,
        len(numbers),
        subplot_titles=[literal(TITLES.get(name, name)) for name in numbers],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    frame = frame.assign(group=frame["made"].mask(frame["collapsed"], BROKEN))
    frame = frame[frame["kind"].isin(("erased", "suppressed"))]
    generator = np.random.default_rng(0)
    for index, (group, colour) in enumerate(GROUPS):
        here = frame[frame["group"] == group]
        for column, name in enumerate(numbers, start=1):
            chart.add_trace(
                go.Scatter(
                    x=here[name],
                    y=index + generator.uniform(-0.28, 0.28, len(here)),
                    mode="markers",
                    marker={"color": colour, "size": 7, "opacity": 0.75},
                    text=(here["family"] + " " + here["model"]).map(literal),
                    hovertemplate="%{text}: %{x:.2f}<extra></extra>",
                    showlegend=False,
                ),
                row=1,
                col=column,
            )
    for bound, colour in ((rule.suppressed_above, "#D55E00"), (rule.margin, "#009E73")):
        for column, name in enumerate(numbers, start=1):
            if name in TITLES:
                chart.add_vline(x=bound, line={"color": colour, "dash": "dash", "width": 1}, row=1, col=column)
    sizes = frame["group"].value_counts()
    chart.update_yaxes(
        tickvals=list(range(len(GROUPS))),
        ticktext=[f"{group} ({sizes.get(group, 0)})" for group, _ in GROUPS],
        range=[len(GROUPS) - 0.4, -0.6],
    )
    chart.update_xaxes(range=[-0.05, 1.05], tickvals=[0, 0.5, 1])
    return _laid_out(chart, width=1200, height=400, left=230)


def rates_figure(table: pd.DataFrame) -> go.Figure:
    """Draw the AUROC of every number with its 95 % interval, the best first.

    Args:
        table: Rates, as `analyses.verdict_benchmark.report.rates` returns them.

    Returns:
        A plotly figure.
    """
    chart = go.Figure()
    ours, net = table["number"].isin((VERDICT, ALONE)), table["number"].str.endswith(NET)
    kinds = (
        ("verdict", ours, "#D55E00", "diamond"),
        ("residuals, net of a control", net, "#0072B2", "circle"),
        ("numbers as papers quote them", ~ours & ~net, "#000000", "square"),
    )
    for name, chosen, colour, marker in kinds:
        rows = table[chosen]
        chart.add_trace(
            go.Scatter(
                x=rows["auroc"],
                y=rows["number"].map(literal),
                mode="markers",
                name=name,
                marker={"color": colour, "size": 10, "symbol": marker},
                error_x=whiskers(rows["auroc"], rows["low"], rows["high"]),
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            )
        )
    order = [*table["number"].map(literal)]
    chart.update_yaxes(
        categoryorder="array",
        categoryarray=order[::-1],
        tickvals=order,
        ticktext=[literal(_short(name)) for name in table["number"]],
    )
    chart.add_vline(x=0.5, line={"color": "#888888", "dash": "dot", "width": 1})
    chart.update_xaxes(title_text="AUROC: models that hold the knowledge against models that do not")
    chart.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": -0.3})
    return _laid_out(chart, width=900, height=140 + 24 * len(order), left=260)


def shares_figure(table: pd.DataFrame) -> go.Figure:
    """Draw the score against the true share of the facts that a model holds, and how often a share is found.

    Args:
        table: Power, as `analyses.verdict_benchmark.report.power` returns it.

    Returns:
        A plotly figure.
    """
    chart = make_subplots(1, 2, subplot_titles=["residual knowledge", "called suppressed"], horizontal_spacing=0.1)
    for index, (hidden, part) in enumerate(table.groupby("hidden by", sort=False)):
        style = {"color": COLOURS[index % len(COLOURS)], "symbol": MARKERS[index % len(MARKERS)], "size": 9}
        for column, name in enumerate(("score", "found"), start=1):
            chart.add_trace(
                go.Scatter(
                    x=part["share"],
                    y=part[name],
                    mode="lines+markers" if len(part) > 1 else "markers",
                    name=literal(hidden),
                    marker=style,
                    showlegend=column == 1,
                    error_y=whiskers(part[name], part[f"{name}_low"], part[f"{name}_high"]),
                ),
                row=1,
                col=column,
            )
    diagonal = {"color": "#888888", "dash": "dot", "width": 1}
    chart.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=diagonal, name="exact"), row=1, col=1)
    chart.add_hline(y=POWER, line=diagonal, row=1, col=2)
    chart.update_xaxes(title_text="true share of the facts that the model holds", range=[-0.05, 1.05])
    chart.update_yaxes(range=[-0.05, 1.05])
    return _laid_out(chart, width=1000, height=420, left=60)


def _short(name: str) -> str:
    return name.replace(NET, " − control").replace(":accuracy", " (accuracy)")


def _laid_out(chart: go.Figure, *, width: int, height: int, left: int) -> go.Figure:
    """Return the figure with the common layout."""
    chart.update_layout(
        template="plotly_white", font=FONT, width=width, height=height, margin={"l": left, "r": 20, "t": 50, "b": 60}
    )
    return chart
