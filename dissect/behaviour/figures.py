"""Draw the figures of `behave` from its tables."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dissect.plotting import COLOURS, FONT, MARKERS, literal, whiskers

_PANELS = {
    "bleu": "BLEU against the base's text",
    "rouge_l": "ROUGE-L F1 against the base's text",
    "kl": "KL(base ‖ model) per answer token, nats",
    "exact_match": "exact match with the answer",
    "probability": "answer probability per token",
    "perplexity": "perplexity of the answers",
}
_COLUMNS = 3

_NAMES = {"base": "base", "unlearned": "unlearned", "control": "control"}
_STYLES = {
    "base": {"color": "#777777", "symbol": "diamond-open", "size": 10},
    "unlearned": {"color": COLOURS[0], "symbol": "circle", "size": 10},
    "control": {"color": COLOURS[1], "symbol": "square-open", "size": 9},
}


def means_figure(means: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw a panel per score with the sets side by side and a point per model, with 95 % intervals.

    Args:
        means: Table of `BehaviourResult.means`.
        title: Title above the plot.

    Returns:
        The figure.
    """
    figure = make_subplots(
        rows=2,
        cols=_COLUMNS,
        subplot_titles=list(_PANELS.values()),
        horizontal_spacing=0.07,
        vertical_spacing=0.16,
    )
    models = [model for model in _NAMES if model in set(means["model"])]
    sets = list(means["set"].unique())
    shown: set[str] = set()
    for panel, metric in enumerate(_PANELS):
        place = {"row": panel // _COLUMNS + 1, "col": panel % _COLUMNS + 1}
        for number, model in enumerate(models):
            points = means[(means["metric"] == metric) & (means["model"] == model)].dropna(subset=["value"])
            if points.empty:
                continue
            shift = 0.16 * (number - (len(models) - 1) / 2)
            trace = _marks(points, [sets.index(name) + shift for name in points["set"]], model)
            trace.update(showlegend=model not in shown, legendrank=number)
            figure.add_trace(trace, **place)
            shown.add(model)
        figure.update_xaxes(
            tickvals=list(range(len(sets))), ticktext=[*map(literal, sets)], range=[-0.5, len(sets) - 0.5], **place
        )
        if metric == "perplexity":
            figure.update_yaxes(type="log", dtick=1, **place)
        elif metric == "kl":
            highest = means.loc[means["metric"] == metric, ["value", "high"]].to_numpy(np.float64)
            top = max(0.1, float(np.nanmax(highest)))
            figure.update_yaxes(range=[-0.03 * top, 1.08 * top], **place)
        else:
            figure.update_yaxes(range=[-0.03, 1.05], **place)
    figure.update_layout(_layout(title), width=1180, height=680)
    return figure


def _marks(points: pd.DataFrame, x: list[float], model: str) -> go.Scatter:
    style = _STYLES[model]
    return go.Scatter(
        x=x,
        y=points["value"],
        error_y=whiskers(points["value"], points["low"], points["high"]) | {"color": style["color"]},
        mode="markers",
        marker=style | {"line": {"width": 2, "color": style["color"]}},
        name=_NAMES[model],
        legendgroup=model,
        customdata=points[["set", "low", "high", "n"]].assign(set=points["set"].map(literal)),
        hovertemplate=(
            "%{customdata[0]}: %{y:.3g} [%{customdata[1]:.3g}, %{customdata[2]:.3g}], n = %{customdata[3]}"
            f"<extra>{_NAMES[model]}</extra>"
        ),
    )


def coefficient_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the relative change of the MLP coefficients by layer: one line per set, dashed for the control.

    Args:
        curve: Table of `BehaviourResult.coefficient_curve`.
        title: Title above the plot.

    Returns:
        The figure.
    """
    figure = go.Figure()
    for number, name in enumerate(curve["set"].unique()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for target in curve["target"].unique():
            line = curve[(curve["set"] == name) & (curve["target"] == target)].sort_values("layer")
            is_control = target == "control"
            figure.add_trace(
                go.Scatter(
                    x=line["layer"],
                    y=line["value"],
                    error_y=whiskers(line["value"], line["low"], line["high"]),
                    mode="lines+markers",
                    line={"color": colour, "width": 2, "dash": "dash" if is_control else "solid"},
                    marker={"symbol": f"{marker}-open" if is_control else marker, "size": 8},
                    name=f"{literal(name)}, control" if is_control else literal(name),
                )
            )
    n_layers = int(curve["layer"].max()) + 1
    figure.update_layout(
        _layout(title),
        xaxis_title="layer",
        yaxis_title="change of MLP coefficients, ‖m − m<sub>base</sub>‖ / ‖m<sub>base</sub>‖",
        width=860,
        height=520,
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(dtick=1 if n_layers <= 16 else 4, range=[-0.3, n_layers - 0.7])
    figure.update_yaxes(rangemode="tozero")
    return figure


def _layout(title: str) -> dict[str, Any]:
    return {
        "title": {"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "margin": {"l": 70, "r": 20, "t": 90, "b": 60},
        "legend": {"orientation": "v"},
    }
