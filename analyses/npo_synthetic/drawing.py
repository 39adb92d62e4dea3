"""Lines with a band and a name at their end, on logarithmic axes with ticks that can be read."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dissect.plotting import FONT, literal

POINTS = 160
"""Evaluations drawn of a longer run, evenly spaced in the logarithm of their number."""
SMALLEST = 1e-12
"""What is drawn at a place where nothing, which has no logarithm, would be."""

Place = tuple[int, int]
"""Row and column of a panel, from 1."""


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], metric: str) -> pd.DataFrame:
    """Return the median of a metric over the seeds and its range: columns `median`, `low` and `high`."""
    grouped = frame.groupby(list(keys), sort=False, dropna=False)[metric]
    return grouped.agg(median="median", low="min", high="max").reset_index()


def thinned(run: pd.DataFrame) -> pd.DataFrame:
    """Return at most `POINTS` rows, the first and the last among them."""
    if len(run) <= POINTS:
        return run
    return run.iloc[np.unique(np.geomspace(1, len(run), POINTS).round().astype(int)) - 1]


def draw_line(
    figure: go.Figure,
    curve: pd.DataFrame,
    name: str,
    line: Mapping[str, Any],
    place: Place,
    *,
    axes: tuple[str, str] = ("step", "median"),
    is_background: bool = False,
) -> None:
    """Draw a line through two columns; a line in the background shows no hover text."""
    figure.add_trace(
        go.Scatter(
            x=curve[axes[0]],
            y=curve[axes[1]],
            customdata=curve["step"],
            name=literal(name),
            mode="lines",
            line=dict(line),
            hoverinfo="skip" if is_background else None,
            hovertemplate=None
            if is_background
            else f"{literal(name)}, step %{{customdata}}: %{{y:.3g}}<extra></extra>",
            showlegend=False,
        ),
        row=place[0],
        col=place[1],
    )


def draw_band(figure: go.Figure, curve: pd.DataFrame, colour: str, place: Place) -> None:
    """Fill between `low` and `high`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_trace(
        go.Scatter(
            x=[*curve["step"], *curve["step"][::-1]],
            y=np.clip([*curve["high"], *curve["low"][::-1]], SMALLEST, None),
            mode="lines",
            fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.13)",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=place[0],
        col=place[1],
    )


def draw_mark(figure: go.Figure, point: tuple[float, float], symbol: str, colour: str, place: Place) -> None:
    """Draw one point."""
    outline = {"width": 2 if symbol.endswith("open") else 0}
    figure.add_trace(
        go.Scatter(
            x=[point[0]],
            y=[point[1]],
            mode="markers",
            marker={"size": 10, "symbol": symbol, "color": colour, "line": outline},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=place[0],
        col=place[1],
    )


def draw_name(figure: go.Figure, name: str, x: float, y: float, colour: str, place: Place, *, shift: int = 5) -> None:
    """Write a name `shift` pixels to the right of a point. On a logarithmic axis a coordinate is its power of ten."""
    figure.add_annotation(
        text=literal(name),
        x=x,
        y=y,
        xanchor="left",
        xshift=shift,
        showarrow=False,
        font={"color": colour, "size": 13},
        row=place[0],
        col=place[1],
    )


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Move labels apart, as little as their order allows, until no two are nearer than `gap`."""
    order = np.argsort(places, kind="stable")
    moved = np.asarray(places, dtype=np.float64)[order]
    for _ in range(1000):
        close = [(i, j) for i, j in pairwise(range(len(moved))) if moved[j] - moved[i] < gap * (1 - 1e-6)]
        if not close:
            break
        for i, j in close:
            middle = (moved[i] + moved[j]) / 2
            moved[i], moved[j] = middle - gap / 2, middle + gap / 2
    result = np.empty_like(moved)
    result[order] = moved
    return [float(place) for place in result]


def power_of_ten(value: float) -> float:
    """Return a value's coordinate on a logarithmic axis."""
    return float(np.log10(max(float(value), SMALLEST)))


def with_margin(low: float, high: float, share: float) -> tuple[float, float]:
    """Powers of ten of two values, moved apart by a share of their distance on both sides."""
    ends = power_of_ten(low), power_of_ten(high)
    margin = share * (ends[1] - ends[0])
    return ends[0] - margin, ends[1] + margin


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Return a logarithmic axis between two powers of ten, with a tick at each, or at 1, 2 and 5 if they are few."""
    leading = (1,) if high - low > 1.7 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for digit in leading]
    text = [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" if tick > 9e-5 else f"{tick:.0e}" for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": text}


def finish(figure: go.Figure, title: str, subtitle: str, *, height: int) -> go.Figure:
    """Title, fonts and size."""
    return figure.update_layout(
        template="plotly_white",
        font=FONT,
        title={
            "text": f"{literal(title)}<br><sup>{literal(subtitle)}</sup>",
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 18},
        },
        margin={"l": 80, "r": 20, "t": 110, "b": 60},
        width=1240,
        height=height,
    )
