"""Draw the figures of `probe` from its tables: solid lines for the unlearned model, dashed lines for the control."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dissect.plotting import COLOURS, FONT, MARKERS, literal, whiskers

_SETS = {"forget": 0, "retain": 1}
_SELECTIONS = {"top": "most changed", "matched": "norm-matched others", "random": "random"}
_TARGETS = {"unlearned": "", "control": ", control"}


def layers_figure(curve: pd.DataFrame, shares: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the change of the coefficients by layer, and its share in the last k layers.

    Args:
        curve: Table of `ProbeResult.layer_curve`.
        shares: Table of `ProbeResult.shares`.
        title: Title above the plot.

    Returns:
        The figure.
    """
    panels = {"relative_change": "relative change", "cosine": "cosine", "share": "share of the change in the last k"}
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(panels.values()), horizontal_spacing=0.06)
    for column, name in enumerate(panels, start=1):
        table, x = (shares, "last_layers") if name == "share" else (curve, "layer")
        for target in _targets(table):
            for prompts in table["prompts"].unique():
                line = table[(table["target"] == target) & (table["prompts"] == prompts)]
                label = f"{prompts} prompts{_TARGETS[target]}"
                for trace in _traces(line, x, name, label, _SETS[str(prompts)], target, legend=column == 1):
                    figure.add_trace(trace, row=1, col=column)
        n_layers = len(shares["last_layers"].unique())
        ticks = {"dtick": 1 if n_layers <= 16 else 4}
        title_text = "last k layers" if name == "share" else "layer"
        figure.update_xaxes(title_text=title_text, row=1, col=column, **ticks)
    even = shares.drop_duplicates("last_layers").sort_values("last_layers")
    figure.add_trace(
        go.Scatter(
            x=even["last_layers"],
            y=even["even"],
            name="spread evenly",
            mode="lines",
            line={"color": "#999999", "width": 1, "dash": "dot"},
        ),
        row=1,
        col=3,
    )
    figure.update_yaxes(title_text="|m_u − m_b| / |m_b|", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(range=[-0.03, 1.03], row=1, col=3)
    figure.update_layout(_layout(title), width=1280, height=480)
    return figure


def neurons_figure(curve: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the KRS against the number of restored neurons.

    Args:
        curve: Table of `ProbeResult.curve`.
        title: Title above the plot.

    Returns:
        The figure.
    """
    figure = go.Figure()
    n_neurons = int(curve["k"].max())
    for target in _targets(curve):
        for number, (selection, label) in enumerate(_SELECTIONS.items()):
            line = curve[(curve["target"] == target) & (curve["selection"] == selection)].sort_values("k")
            for trace in _traces(line, "k", "krs", label + _TARGETS[target], number, target, legend=True):
                figure.add_trace(trace)
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    figure.add_hline(y=1, line={"color": "#999999", "width": 1, "dash": "dot"})
    powers = [2**power for power in range(0, n_neurons.bit_length(), 2) if 2 ** (power + 1) <= n_neurons]
    figure.update_xaxes(
        type="log",
        title_text="restored MLP coefficients (k)",
        tickvals=[*powers, n_neurons],
        ticktext=[*map(str, powers), f"all {n_neurons}"],
    )
    figure.update_yaxes(title_text="knowledge recovery score (KRS)")
    figure.update_layout(_layout(title), width=940, height=520)
    return figure


def scaling_figure(scaling: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw recovery on forget prompts against damage on retain prompts, one point per factor.

    Without retain prompts, recovery is drawn against the factor.

    Args:
        scaling: Table of `ProbeResult.scaling`.
        title: Title above the plot.

    Returns:
        The figure.
    """
    panels = {"krs": "KRS on forget prompts", "logprob": "answer log-probability on forget prompts"}
    has_retain = "retain" in set(scaling["prompts"])
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(panels.values()), horizontal_spacing=0.1)
    for column, name in enumerate(panels, start=1):
        for target in _targets(scaling):
            ours = scaling[scaling["target"] == target]
            forget = ours[ours["prompts"] == "forget"].set_index("factor")
            damage = ours[ours["prompts"] == "retain"].set_index("factor")["kl_own"]
            factors = [f"{factor:g}" for factor in forget.index]
            figure.add_trace(
                go.Scatter(
                    x=damage.loc[forget.index] if has_retain else forget.index,
                    y=forget[name],
                    error_y=whiskers(forget[name], forget[f"{name}_low"], forget[f"{name}_high"]) | {"width": 0},
                    name=f"unlearned model{_TARGETS[target]}" if target == "unlearned" else "control",
                    mode="lines+markers+text",
                    text=[one if one in ("1", "2") else "" for one in factors],
                    textposition="top center",
                    **_style(0 if target == "unlearned" else 1, target),
                    legendgroup=target,
                    showlegend=column == 1,
                    customdata=factors,
                    hovertemplate="factor %{customdata}: %{y:.3f}, damage %{x:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        label = "damage: KL from the model's own unscaled output on retain prompts, nats" if has_retain else "factor"
        figure.update_xaxes(title_text=label, zeroline=False, row=1, col=column)
    figure.update_yaxes(title_text="KRS", row=1, col=1)
    figure.update_yaxes(title_text="nats per token", row=1, col=2)
    figure.update_layout(_layout(title), width=1180, height=520)
    return figure


def _targets(table: pd.DataFrame) -> list[str]:
    return [name for name in _TARGETS if name in set(table["target"])]


def _traces(
    line: pd.DataFrame, x: str, y: str, label: str, number: int, target: str, *, legend: bool
) -> list[go.Scatter]:
    """Return a line with its 95 % band."""
    traces = []
    band = line.dropna(subset=[f"{y}_low", f"{y}_high"])
    if len(band):
        traces.append(
            go.Scatter(
                x=[*band[x], *band[x][::-1]],
                y=[*band[f"{y}_high"], *band[f"{y}_low"][::-1]],
                mode="lines",
                fill="toself",
                fillcolor=_faint(COLOURS[number], 0.14 if target == "unlearned" else 0.07),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=label,
            )
        )
    traces.append(
        go.Scatter(
            x=line[x],
            y=line[y],
            name=label,
            mode="lines+markers",
            **_style(number, target),
            legendgroup=label,
            showlegend=legend,
            customdata=line[[f"{y}_low", f"{y}_high"]],
            hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
    )
    return traces


def _style(number: int, target: str) -> dict[str, Any]:
    solid = target == "unlearned"
    return {
        "line": {"color": COLOURS[number], "width": 2, "dash": "solid" if solid else "dash"},
        "marker": {"symbol": MARKERS[number] if solid else f"{MARKERS[number]}-open", "size": 8},
    }


def _faint(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _layout(title: str) -> dict[str, Any]:
    return {
        "title": {"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "margin": {"l": 70, "r": 20, "t": 80, "b": 60},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top"},
    }
