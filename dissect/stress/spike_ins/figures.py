"""The figure of spike-ins: where the user's facts stand between people never shown and people hidden."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from dissect.plotting import COLOURS, FONT, literal, whiskers
from dissect.stress.core.scores import RANK_FLOOR
from dissect.stress.spike_ins.scale import Scale

_SETS = (
    ("zero", "invented, never shown", COLOURS[2], "circle"),
    ("ceiling", "invented, hidden", COLOURS[1], "circle"),
    ("user", "yours", "#000000", "diamond"),
)
"""Number of the scale, its name, colour and symbol."""


def spike_ins_figure(scales: Sequence[Scale]) -> go.Figure:
    """Draw the mean rank of three sets of facts under every attack, with 95 % intervals.

    Args:
        scales: The scales of the attacks.

    Returns:
        A plotly figure with one row per attack; a vertical line marks chance.
    """
    chart = go.Figure()
    for number, name, colour, symbol in _SETS:
        found = pd.DataFrame([vars(getattr(scale, number)) for scale in scales], columns=["value", "low", "high", "n"])
        chart.add_trace(
            go.Scatter(
                x=found["value"],
                y=[literal(scale.attack) for scale in scales],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 12},
                error_x=whiskers(found["value"], found["low"], found["high"]),
                name=name,
                customdata=found[["n"]],
                hovertemplate="%{y}, " + name + ": %{x:.2f} (%{customdata[0]} people)<extra></extra>",
            )
        )
    chart.add_vline(x=RANK_FLOOR, line={"color": "#888888", "dash": "dot", "width": 1}, annotation_text="chance")
    chart.update_xaxes(title_text="mean rank of the right answers under the attack")
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        width=900,
        height=200 + 60 * len(scales),
        margin={"l": 170, "r": 20, "t": 40, "b": 60},
    )
    return chart
