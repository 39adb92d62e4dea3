"""Figures of a decomposition, drawn from its curve."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dissect.plotting import COLOURS, FONT, MARKERS, literal, whiskers

PANELS = {"mlp_out": "MLP (down projection)", "attn_out": "attention (output projection)"}
_LOOKS = {
    "weight": (0, "weight"),
    "coefficient": (1, "coefficient"),
    "interaction": (2, "interaction"),
    "total": (3, "all three"),
}
_ARMS = {
    "main": ("solid", "", -0.15),
    "control": ("dash", ", control", 0.0),
    "null": ("dot", ", random update", 0.15),
}
"""Line style, legend and offset in the column of all layers, by arm."""


def krs_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the KRS of the unlearned model with each term added, per layer and in all layers.

    Args:
        curve: `DecompositionResult.curve()`.
        title: Title of the figure.

    Returns:
        A plotly figure.
    """
    figure = _term_figure(curve, "krs", ["weight", "coefficient", "interaction", "total"], title=title)
    figure.update_yaxes(title_text="knowledge recovery score (KRS)", col=1)
    figure.add_hline(y=1, line={"color": "#999999", "width": 1, "dash": "dot"})
    return figure


def shares_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw each term's share of the change of the output; the three shares add up to 1 (dotted line).

    Args:
        curve: `DecompositionResult.curve()`.
        title: Title of the figure.

    Returns:
        A plotly figure.
    """
    figure = _term_figure(curve, "share", ["weight", "coefficient", "interaction"], title=title)
    figure.update_yaxes(title_text="share of the change", col=1)
    figure.add_hline(y=1, line={"color": "#999999", "width": 1, "dash": "dot"})
    return figure


def direct_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw each term's direct contribution to the answer token's logit, minus its mean over the vocabulary.

    The sum over all layers is left out, since it is on another scale.

    Args:
        curve: `DecompositionResult.curve()`.
        title: Title of the figure.

    Returns:
        A plotly figure.
    """
    single = curve[curve["first_layer"] == curve["last_layer"]]
    figure = _term_figure(single, "direct_centred", ["weight", "coefficient", "interaction", "total"], title=title)
    figure.update_yaxes(title_text="direct contribution to the answer's logit (logits)", col=1)
    return figure


def _term_figure(curve: pd.DataFrame, value: str, terms: list[str], *, title: str) -> go.Figure:
    sites = list(curve["site"].unique())
    figure = make_subplots(
        rows=1,
        cols=len(sites),
        subplot_titles=[PANELS[site] for site in sites],
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    n_layers = int(curve["last_layer"].max()) + 1
    for column, site in enumerate(sites, start=1):
        for term in terms:
            for arm in curve["arm"].unique():
                chosen = (curve["site"] == site) & (curve["term"] == term) & (curve["arm"] == arm)
                for trace in _traces(curve[chosen], value, term, arm, n_layers):
                    trace.showlegend = trace.showlegend is not False and column == 1
                    figure.add_trace(trace, row=1, col=column)
        step = 1 if n_layers <= 16 else 4
        ticks = list(range(0, n_layers, step))
        has_all = bool((curve["last_layer"] > curve["first_layer"]).any())
        figure.update_xaxes(
            title_text="layer",
            tickvals=[*ticks, n_layers + 0.5] if has_all else ticks,
            ticktext=[*map(str, ticks), "all"] if has_all else [*map(str, ticks)],
            range=[-0.4, n_layers + (1 if has_all else -0.6)],
            row=1,
            col=column,
        )
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    figure.update_layout(
        title={"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        template="plotly_white",
        font=FONT,
        legend={"title": "term"},
        margin={"l": 70, "r": 20, "t": 80, "b": 60},
        width=300 + 430 * len(sites),
        height=max(480, 170 + 32 * len(terms) * curve["arm"].nunique()),  # else the legend is cut off
    )
    return figure


def _traces(line: pd.DataFrame, value: str, term: str, arm: str, n_layers: int) -> list[go.Scatter]:
    """Return a term's band and line over the layers, and its value in all layers with an error bar."""
    number, label = _LOOKS[term]
    colour, marker, is_main = COLOURS[number], MARKERS[number], arm == "main"
    dash, suffix, shift = _ARMS[arm]
    name = label + suffix
    group = f"{term} {arm}"
    single = line[line["first_layer"] == line["last_layer"]]
    whole = line[line["first_layer"] < line["last_layer"]]
    look = {"symbol": marker if is_main else f"{marker}-open", "size": 8, "color": colour}
    hover = f"{name}, layer %{{text}}: %{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]<extra></extra>"
    band = single.dropna(subset=[f"{value}_low", f"{value}_high"])
    traces = []
    if len(band):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        traces.append(
            go.Scatter(
                x=[*band["first_layer"], *band["first_layer"][::-1]],
                y=[*band[f"{value}_high"], *band[f"{value}_low"][::-1]],
                mode="lines",
                fill="toself",
                fillcolor=f"rgba({red},{green},{blue},{0.16 if is_main else 0.08})",
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=group,
            )
        )
    traces.append(
        go.Scatter(
            x=single["first_layer"],
            y=single[value],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker=look,
            legendgroup=group,
            text=single["first_layer"].astype(str),
            customdata=single[[f"{value}_low", f"{value}_high"]],
            hovertemplate=hover,
        )
    )
    if len(whole):
        position = n_layers + 0.5 + shift + 0.02 * number
        traces.append(
            go.Scatter(
                x=[position],
                y=whole[value],
                error_y=whiskers(whole[value], whole[f"{value}_low"], whole[f"{value}_high"]),
                mode="markers",
                marker=look,
                showlegend=False,
                legendgroup=group,
                text=["all"],
                customdata=whole[[f"{value}_low", f"{value}_high"]],
                hovertemplate=hover,
            )
        )
    return traces
