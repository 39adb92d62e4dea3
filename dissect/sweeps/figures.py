"""Figures of patch and restore: KRS by layer, differences, a heatmap of examples."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dissect.plotting import ARM_NAMES, COLOURS, DASHES, MARKERS, faint, layout, literal, whiskers


def recovery_figure(curve: pd.DataFrame, *, title: str = "", legend: str = "patched from the base") -> go.Figure:
    """Draw KRS against the window's centre layer: a panel per kind of window, a line per site with its 95 % band.

    The control is dashed, null models are dotted, other donors dash-dotted. Sites with a single window, such as
    `embed`, share a panel, site next to site.

    Args:
        curve: `SweepResult.curve()`.
        title: Title of the figure.
        legend: Heading of the legend.

    Returns:
        A plotly figure.
    """
    lines = curve.assign(dash=curve["arm"].map(lambda arm: DASHES.get(arm, "dashdot")))
    lines["line"] = lines["site"] + _arm_labels(curve).map(lambda label: f", {label}" if label else "")
    lines["row"] = ""
    return _panels(lines, "krs", "knowledge recovery score (KRS)", title=title, legend=legend, top=1.0)


def difference_figure(contrast: pd.DataFrame, *, title: str = "", legend: str = "patched from the base") -> go.Figure:
    """Draw KRS minus that of the other arms, a row of panels each, with 95 % bands.

    Args:
        contrast: `SweepResult.contrast()`.
        title: Title of the figure.
        legend: Heading of the legend.

    Returns:
        A plotly figure.
    """
    lines = contrast.assign(dash="solid", line=contrast["site"])
    lines["row"] = "KRS − " + _arm_labels(contrast)
    return _panels(lines, "difference", "", title=title, legend=legend, top=None)


def _arm_labels(table: pd.DataFrame) -> pd.Series:
    """Return the name of each row's arm; the main arm has none."""
    names = [
        "" if arm == "main" else f"from {donor}" if arm == "donor" else ARM_NAMES.get(arm, arm)
        for arm, donor in zip(table["arm"], table["donor"], strict=True)
    ]
    return pd.Series(names, index=table.index, dtype=str)


def _panels(lines: pd.DataFrame, value: str, axis: str, *, title: str, legend: str, top: float | None) -> go.Figure:
    """Draw a column of panels per kind of window, and a row per value of `row`.

    Kinds with a single window share one column of panels.

    Args:
        lines: The columns `row`, `line`, `dash`, `site`, `window`, `centre`, first and last layer, and the value with
            its interval and n.
        value: Name of the value's column.
        axis: Title of the vertical axis.
        title: Title of the figure.
        legend: Heading of the legend.
        top: Height of a dotted line, or None.

    Returns:
        A plotly figure.
    """
    kinds = list(lines["window"].unique())
    is_sweep = {kind: lines[lines["window"] == kind]["centre"].nunique() > 1 for kind in kinds}
    swept = [kind for kind in kinds if is_sweep[kind]]
    columns = [_kind_title(kind) for kind in swept] + (["one window"] if not all(is_sweep.values()) else [])
    rows = list(lines["row"].unique())
    titles = columns + [""] * (len(columns) * (len(rows) - 1))
    figure = make_subplots(
        rows=len(rows),
        cols=len(columns),
        subplot_titles=titles if len(columns) > 1 else None,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.25 / len(rows),
    )
    sites = list(lines["site"].unique())
    n_layers = int(lines["last_layer"].max()) + 1
    shown: set[str] = set()
    for number, row in enumerate(rows, start=1):
        here = lines[lines["row"] == row]
        for column, kind in enumerate(swept, start=1):
            for name, line in here[here["window"] == kind].groupby("line", sort=False):
                style = sites.index(line["site"].iloc[0])
                _add_line(figure, line, str(name), value, style, (number, column), is_named=name not in shown)
                shown.add(str(name))
            figure.update_xaxes(
                title_text=_KIND_AXES.get(kind, "centre layer of the window"),
                dtick=1 if n_layers <= 16 else 4,
                range=[-0.3, n_layers - 0.7],
                row=number,
                col=column,
            )
        for name, line in here[~here["window"].map(is_sweep)].groupby("line", sort=False):
            style = sites.index(line["site"].iloc[0])
            _add_points(figure, line, str(name), value, style, (number, len(columns)), is_named=name not in shown)
            shown.add(str(name))
        figure.update_yaxes(title_text=literal(row) or axis, row=number, col=1)
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    if top is not None:
        figure.add_hline(y=top, line={"color": "#999999", "width": 1, "dash": "dot"})
    figure.update_layout(
        layout(title, legend),
        width=860 if len(columns) == 1 else 320 + 360 * len(columns),
        height=max(520 if len(rows) == 1 else 80 + 340 * len(rows), 180 + 28 * len(shown)),
    )
    return figure


_KIND_AXES = {"prefix": "last layer of the prefix", "suffix": "first layer of the suffix"}


def _kind_title(kind: str) -> str:
    if kind == "prefix":
        return "prefix: layers 0 to l"
    if kind == "suffix":
        return "suffix: layer l to the last"
    return f"windows of {kind}" if kind.isdigit() and kind != "1" else "single layers" if kind == "1" else literal(kind)


def _add_line(
    figure: go.Figure, line: pd.DataFrame, name: str, value: str, style: int, panel: tuple[int, int], *, is_named: bool
) -> None:
    colour, marker, dash = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)], line["dash"].iloc[0]
    is_main = dash == "solid"
    band = line.dropna(subset=[f"{value}_low", f"{value}_high"])
    if len(band):
        figure.add_trace(
            go.Scatter(
                x=[*band["centre"], *band["centre"][::-1]],
                y=[*band[f"{value}_high"], *band[f"{value}_low"][::-1]],
                mode="lines",
                fill="toself",
                fillcolor=faint(colour, 0.16 if is_main else 0.08),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            ),
            row=panel[0],
            col=panel[1],
        )
    figure.add_trace(
        go.Scatter(
            x=line["centre"],
            y=line[value],
            name=literal(name),
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"symbol": marker if is_main else f"{marker}-open", "size": 8},
            showlegend=is_named,
            legendgroup=name,
            customdata=line[["first_layer", "last_layer", f"{value}_low", f"{value}_high", "n"]],
            hovertemplate=f"{_HOVER}<extra></extra>",
        ),
        row=panel[0],
        col=panel[1],
    )


_HOVER = (
    "layers %{customdata[0]}–%{customdata[1]}: %{y:.3f} "
    "[%{customdata[2]:.3f}, %{customdata[3]:.3f}], n = %{customdata[4]}"
)


def _add_points(
    figure: go.Figure, line: pd.DataFrame, name: str, value: str, style: int, panel: tuple[int, int], *, is_named: bool
) -> None:
    colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
    figure.add_trace(
        go.Scatter(
            x=line["site"].map(literal)
            + line["window"].map(lambda kind: "" if kind == "all" else f"<br>{literal(kind)}"),
            y=line[value],
            error_y=whiskers(line[value], line[f"{value}_low"], line[f"{value}_high"]),
            name=literal(name),
            mode="markers",
            marker={
                "color": colour,
                "symbol": marker if line["dash"].iloc[0] == "solid" else f"{marker}-open",
                "size": 9,
            },
            showlegend=is_named,
            legendgroup=name,
            customdata=line[["first_layer", "last_layer", f"{value}_low", f"{value}_high", "n"]],
            hovertemplate=f"{_HOVER}<extra></extra>",
        ),
        row=panel[0],
        col=panel[1],
    )


def comparison_figure(curves: dict[str, pd.DataFrame], *, columns: int = 2, title: str = "") -> go.Figure:
    """Draw the curves of several pairs next to each other, one panel per pair, on the same axes.

    Args:
        curves: `SweepResult.curve()` by the panel's title, each of one kind of window.
        columns: Number of panels in a row.
        title: Title of the figure.

    Returns:
        A plotly figure.
    """
    n_rows = -(-len(curves) // columns)
    figure = make_subplots(
        rows=n_rows,
        cols=columns,
        subplot_titles=[*map(literal, curves)],
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.16 / n_rows,
    )
    for index, curve in enumerate(curves.values()):
        panel = {"row": index // columns + 1, "col": index % columns + 1}
        for trace in recovery_figure(curve).data:
            trace.showlegend = trace.showlegend is not False and index == 0
            figure.add_trace(trace, **panel)
        figure.update_xaxes(dtick=1 if curve["centre"].max() < 16 else 4, **panel)
        if panel["row"] == n_rows:
            figure.update_xaxes(title_text="centre layer of the window", **panel)
        if panel["col"] == 1:
            figure.update_yaxes(title_text="KRS", **panel)
    values = [curve[["krs", "krs_low"]].to_numpy(np.float64) for curve in curves.values()]
    lowest = min(0.0, float(np.nanmin(np.concatenate(values))))
    figure.update_yaxes(range=[lowest - 0.03, 1.03])
    height = 150 + 300 * n_rows
    figure.update_layout(
        layout(title),
        width=120 + 440 * columns,
        height=height,
        margin={"l": 70, "r": 20, "t": 110, "b": 60},
        legend={
            "orientation": "h",
            "title": None,
            "y": 1 + 50 / (height - 170),
            "yanchor": "bottom",
            "entrywidth": 0.98 / max(2, columns),
            "entrywidthmode": "fraction",
            "traceorder": "normal",
        },
    )
    return figure


def example_heatmap(frame: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the main arm's KRS of every example in every window of the first kind, one panel per site.

    Args:
        frame: `SweepResult.frame`.
        title: Title of the figure.

    Returns:
        A plotly figure.
    """
    first_kind = frame["window"].iloc[0]
    ours = frame[(frame["arm"] == "main") & (frame["window"] == first_kind)]
    sites = list(ours["site"].unique())
    examples = ours.drop_duplicates("example_index").sort_values("example_index")["example"].tolist()
    figure = make_subplots(
        rows=1, cols=len(sites), subplot_titles=[*map(literal, sites)], shared_yaxes=True, horizontal_spacing=0.03
    )
    for column, site in enumerate(sites, start=1):
        table = ours[ours["site"] == site].pivot(index="example_index", columns="centre", values="krs")
        figure.add_trace(
            go.Heatmap(
                x=table.columns,
                y=list(range(len(examples))),
                z=table.to_numpy(),
                text=[[literal(example)] * table.shape[1] for example in examples],
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
        layout(title),
        coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": {"title": "KRS"}},
        width=180 + 260 * len(sites),
        height=min(1200, max(420, 160 + 8 * len(examples))),
    )
    return figure
