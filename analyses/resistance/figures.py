"""Resistance as a picture: steps to recover, method by method, beside relearning from nothing."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.resistance.run import CONTROL
from dissect.plotting import COLOURS, FONT, literal

KINDS = {
    "other_facts": ("a quarter is back, relearning other facts", "circle"),
    "same_facts": ("half is back, relearning the facts themselves", "diamond-open"),
}


def resistance_figure(models: pd.DataFrame, *, most_steps: int) -> go.Figure:
    """Draw one panel per world: a line per method, further to the right is more resistant.

    Args:
        models: Rows of `analyses.resistance.tables.models_of`.
        most_steps: Largest number of steps of relearning; what was not reached stands right of it.

    Returns:
        The figure. A mark is one seed; the vertical line is where the control, which never knew, reaches the same by
        relearning the facts themselves.
    """
    worlds = list(dict.fromkeys(models["world"]))
    beyond = 2 * most_steps
    chart = make_subplots(1, len(worlds), subplot_titles=[literal(world) for world in worlds], horizontal_spacing=0.14)
    for column, world in enumerate(worlds, start=1):
        here = models[models["world"] == world]
        unlearned = here[here["method"] != CONTROL]
        names = unlearned["method"].map(literal)
        for number, (name, (label, symbol)) in enumerate(KINDS.items()):
            steps = unlearned[name].clip(lower=0.5, upper=beyond)
            chart.add_trace(
                go.Scatter(
                    x=steps,
                    y=names,
                    mode="markers",
                    marker={"symbol": symbol, "size": 10, "color": COLOURS[number], "line": {"width": 2}},
                    name=label,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        from_nothing = here.loc[here["method"] == CONTROL, "same_facts"].clip(upper=beyond)
        if len(from_nothing):
            chart.add_trace(
                go.Scatter(
                    x=[float(np.exp(np.log(from_nothing).mean()))] * 2,
                    y=[names.iloc[0], names.iloc[-1]],
                    mode="lines",
                    line={"color": "#888888", "dash": "dot", "width": 2},
                    name="the same in a model that never knew",
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        powers = 2 ** np.arange(int(np.log2(most_steps)) + 1)
        chart.update_xaxes(
            type="log",
            title="steps of relearning",
            tickvals=[0.5, *powers, beyond],
            ticktext=["0", *map(str, powers), f"> {most_steps}"],
            range=[np.log10(0.4), np.log10(1.3 * beyond)],
            row=1,
            col=column,
        )
        chart.update_yaxes(autorange="reversed", row=1, col=column)
    rows = max(models.groupby("world")["method"].nunique())
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        width=520 * len(worlds) + 80,
        height=210 + 28 * rows,
        legend={"orientation": "v", "yanchor": "top", "y": -70 / (28 * rows), "x": 0},
        margin={"l": 120, "r": 20, "t": 40, "b": 170},
    )
    return chart
