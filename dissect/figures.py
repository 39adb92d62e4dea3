"""Figures as pure functions of result tables, and their export for papers."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dissect.runs import write_bytes
from unlearning.errors import InputError

FORMATS = ("html", "pdf", "svg", "png")

# Okabe-Ito: told apart by colour-blind readers; the markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star")

FONT = {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222222"}


def recovery_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """KRS against the window's centre layer: a line per site with its 95 % band, the control dashed.

    Args:
        curve: `PatchingResult.curve()`.
        title: above the plot.
    """
    figure = go.Figure()
    for number, site in enumerate(curve["site"].unique()):
        for target in curve["target"].unique():
            line = curve[(curve["site"] == site) & (curve["target"] == target)]
            _add_line(figure, line, site, target, COLOURS[number % 6], MARKERS[number % 6])
    n_layers = int(curve["centre"].max()) + 1
    figure.update_layout(
        _layout(title),
        xaxis_title="centre layer of the window",
        yaxis_title="knowledge recovery score (KRS)",
        width=860,
        height=520,
    )
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    figure.add_hline(y=1, line={"color": "#999999", "width": 1, "dash": "dot"})
    figure.update_xaxes(dtick=1 if n_layers <= 16 else 4, range=[-0.3, n_layers - 0.7])
    return figure


def _add_line(figure: go.Figure, line: pd.DataFrame, site: str, target: str, colour: str, marker: str) -> None:
    is_control = target == "control"
    group = f"{site} {target}"
    band = line.dropna(subset=["krs_low", "krs_high"])
    if len(band):
        figure.add_trace(
            go.Scatter(
                x=[*band["centre"], *band["centre"][::-1]],
                y=[*band["krs_high"], *band["krs_low"][::-1]],
                mode="lines",
                fill="toself",
                fillcolor=_faint(colour, 0.08 if is_control else 0.16),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=group,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=line["centre"],
            y=line["krs"],
            name=f"{site}, never-trained control" if is_control else site,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dash" if is_control else "solid"},
            marker={"symbol": f"{marker}-open" if is_control else marker, "size": 8},
            legendgroup=group,
            customdata=line[["first_layer", "last_layer", "krs_low", "krs_high", "n"]],
            hovertemplate=(
                "layers %{customdata[0]}–%{customdata[1]}: KRS %{y:.3f} "
                "[%{customdata[2]:.3f}, %{customdata[3]:.3f}], n = %{customdata[4]}<extra></extra>"
            ),
        )
    )


def comparison_figure(curves: dict[str, pd.DataFrame], *, columns: int = 2, title: str = "") -> go.Figure:
    """The curves of several pairs beside each other, one panel a pair, on the same axes.

    Args:
        curves: `PatchingResult.curve()` by the panel's title.
        columns: panels in a row.
        title: above the plot.
    """
    n_rows = -(-len(curves) // columns)
    figure = make_subplots(
        rows=n_rows,
        cols=columns,
        subplot_titles=list(curves),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.16 / n_rows,
    )
    for panel, curve in enumerate(curves.values()):
        place = {"row": panel // columns + 1, "col": panel % columns + 1}
        for trace in recovery_figure(curve).data:
            trace.showlegend = trace.showlegend is not False and panel == 0
            figure.add_trace(trace, **place)
        figure.update_xaxes(dtick=1 if curve["centre"].max() < 16 else 4, **place)
        if place["row"] == n_rows:
            figure.update_xaxes(title_text="centre layer of the window", **place)
        if place["col"] == 1:
            figure.update_yaxes(title_text="KRS", **place)
    lowest = min(0.0, *(curve["krs_low"].min() for curve in curves.values()))
    figure.update_yaxes(range=[lowest - 0.03, 1.03])
    height = 150 + 300 * n_rows
    figure.update_layout(
        _layout(title),
        width=120 + 440 * columns,
        height=height,
        margin={"l": 70, "r": 20, "t": 110, "b": 60},
        legend={
            "orientation": "h",
            "title": None,
            "y": 1 + 50 / (height - 170),
            "yanchor": "bottom",
            "entrywidth": 0.49,
            "entrywidthmode": "fraction",
            "traceorder": "normal",
        },
    )
    return figure


def example_heatmap(frame: pd.DataFrame, *, title: str = "") -> go.Figure:
    """KRS of every example in every window of the unlearned model, one panel per site.

    Args:
        frame: `PatchingResult.frame`.
        title: above the plot.
    """
    ours = frame[frame["target"] == "unlearned"]
    sites = list(ours["site"].unique())
    examples = ours.drop_duplicates("example_index").sort_values("example_index")["example"].tolist()
    figure = make_subplots(rows=1, cols=len(sites), subplot_titles=sites, shared_yaxes=True, horizontal_spacing=0.03)
    for column, site in enumerate(sites, start=1):
        table = ours[ours["site"] == site].pivot(index="example_index", columns="centre", values="krs")
        figure.add_trace(
            go.Heatmap(
                x=table.columns,
                y=list(range(len(examples))),
                z=table.to_numpy(),
                text=[[example] * table.shape[1] for example in examples],
                coloraxis="coloraxis",
                hovertemplate="%{text}<br>centre %{x}: KRS %{z:.3f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="centre layer", dtick=1 if table.shape[1] <= 16 else 4, row=1, col=column)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(title_text="example", row=1, col=1)
    figure.update_layout(
        _layout(title),
        coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": {"title": "KRS"}},
        width=180 + 260 * len(sites),
        height=min(1200, max(420, 160 + 8 * len(examples))),
    )
    return figure


def _layout(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "legend": {"title": "patched from the base"},
        "margin": {"l": 70, "r": 20, "t": 60, "b": 60},
    }


def _faint(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def check_formats(formats: Sequence[str]) -> None:
    """Check the names of figure formats.

    Raises:
        InputError: one is unknown.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"--format {name}: unknown; use {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and why an image that was asked for is not among it."""

    paths: tuple[Path, ...]
    problem: str | None = None


def export(figure: go.Figure, stem: Path, *, formats: Sequence[str] = ("html",)) -> Exported:
    """Write a figure as `stem.html`, `stem.pdf` and so on. HTML is always written.

    An image that this machine cannot export is left out and the reason given: a finished computation never
    fails over its picture.

    Raises:
        InputError: an unknown format, or a place that cannot be written to.
    """
    check_formats(formats)
    page = figure.to_html(include_plotlyjs=True, full_html=True).encode()
    contents, problem = {"html": page}, None
    for name in dict.fromkeys(formats):
        if name == "html":
            continue
        try:
            contents[name] = figure.to_image(format=name, scale=2 if name == "png" else 1)
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            problem = _export_problem(error)
            break
    paths = []
    for name, content in contents.items():
        paths.append(stem.with_name(f"{stem.name}.{name}"))  # with_suffix would cut `llama-3.2`
        write_bytes(paths[-1], content)
    return Exported(tuple(paths), problem)


def _export_problem(error: Exception) -> str:
    if importlib.util.find_spec("kaleido") is None:
        return "pdf, svg and png need kaleido: pip install 'dissect-unlearning[export]'"
    text = str(error).strip()
    if type(error).__name__ == "ChromeNotFoundError" or "Chrome" in text:
        return "pdf, svg and png need Chromium: apt-get install chromium, or run plotly_get_chrome"
    return f"the image export failed: {text.splitlines()[0] if text else type(error).__name__}"
