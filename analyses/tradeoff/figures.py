"""The trade-off as a picture: forget quality against utility, each run's path over its steps, the front of the best."""

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.tradeoff.report import QUALITY, UTILITY, front
from dissect.plotting import COLOURS, FONT, MARKERS, literal

SIGNIFICANT = 0.05


def tradeoff_figure(
    trajectories: pd.DataFrame,
    *,
    control_utility: Mapping[str, float],
    title: str = "",
    titles: Mapping[str, str] | None = None,
) -> go.Figure:
    """Draw one panel per split; up and to the right is better.

    A line is one run from the base (star) over its evaluations to its end (large marker). Runs of one method have one
    colour, whatever their weights (`npo_rt_10`, `npo_rt_100`) and seeds. The grey line is the front: the points that no
    step of any run beats in both. Above the dotted line the truth ratios cannot be told from the control's at the 5 %
    level; the open diamond is the control itself.

    Args:
        trajectories: Table of `analyses.tradeoff.report.read_trajectories`.
        control_utility: Utility of the control, by split.
        title: Title of the figure.
        titles: Titles of the panels, by split.

    Returns:
        The figure.
    """
    splits = list(dict.fromkeys(trajectories["split"]))
    methods = list(dict.fromkeys(map(_method, trajectories["name"])))
    chart = make_subplots(
        1,
        len(splits),
        subplot_titles=[literal((titles or {}).get(split, split)) for split in splits],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    shown: set[str] = set()
    for column, split in enumerate(splits, start=1):
        here = trajectories[trajectories["split"] == split]
        best = front(here)
        chart.add_trace(
            go.Scatter(
                x=best[UTILITY],
                y=_log10(best[QUALITY]),
                mode="lines",
                line={"color": "#BBBBBB", "width": 8, "shape": "vh"},
                name="front of all steps",
                hoverinfo="skip",
                showlegend=column == 1,
            ),
            row=1,
            col=column,
        )
        for (name, seed), run in here.groupby(["name", "seed"], sort=False):
            method = _method(name)
            path = _path(run.sort_values("step"), methods.index(method), name, seed, method not in shown)
            chart.add_trace(path, row=1, col=column)
            shown.add(method)
        base = here.sort_values("step").iloc[0]
        marks = [("base", float(base[UTILITY]), float(_log10(base[QUALITY])), "star", 16)]
        if split in control_utility:
            marks.append(("control", control_utility[split], 0.0, "diamond-open", 13))
        for label, x, y, symbol, size in marks:
            chart.add_trace(
                go.Scatter(
                    x=[x],
                    y=[y],
                    mode="markers",
                    marker={"symbol": symbol, "size": size, "color": "#222222", "line": {"width": 2}},
                    name=label,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        chart.add_hline(
            y=np.log10(SIGNIFICANT), line={"color": "#888888", "dash": "dot", "width": 1}, row=1, col=column
        )
        widest = max(float(trajectories[UTILITY].max()), *control_utility.values(), 0.0)
        chart.update_xaxes(title_text="retain utility", range=[-0.03, 1.05 * widest], row=1, col=column)
    chart.update_yaxes(title_text="forget quality, log<sub>10</sub> p", row=1, col=1)
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        title={"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        width=140 + 360 * len(splits),
        height=480,
        margin={"l": 70, "r": 20, "t": 80, "b": 60},
    )
    return chart


def _path(run: pd.DataFrame, style: int, name: str, seed: int, in_legend: bool) -> go.Scatter:
    colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
    return go.Scatter(
        x=run[UTILITY],
        y=_log10(run[QUALITY]),
        mode="lines+markers",
        line={"color": colour, "width": 1.5},
        marker={"symbol": marker, "color": colour, "size": [4] * (len(run) - 1) + [11]},
        name=literal(_method(name)),
        legendgroup=_method(name),
        showlegend=in_legend,
        customdata=np.stack([run["step"], np.full(len(run), seed)], axis=1),
        hovertemplate=f"{literal(name)}, step %{{customdata[0]}}, seed %{{customdata[1]}}<br>utility %{{x:.3f}}, "
        "log10 p %{y:.2f}<extra></extra>",
    )


def _method(name: str) -> str:
    """Return a run's name without the number that tells its weight from another's."""
    return re.sub(r"_\d+$", "", name)


def _log10(quality: pd.Series | float) -> np.ndarray:
    """Return the logarithm, at least that of the smallest double: an exact p-value is never 0."""
    return np.log10(np.maximum(quality, np.finfo(np.float64).tiny))
