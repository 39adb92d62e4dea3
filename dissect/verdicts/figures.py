"""The figures of a verdict: the residual of every test, and the score among those of reference models."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from dissect.plotting import COLOURS, FONT, literal, whiskers
from dissect.verdicts.rule import Rule, Score

LOWEST = -1.0
"""Lower residuals are drawn at this value."""

KIND_COLOURS = ("#009E73", "#E69F00", "#D55E00")
"""Colours of reference models that hold nothing, a part, or all of the knowledge."""

LEVEL_COLOURS = {level: COLOURS[level] for level in range(5)}


def evidence_figure(evidence: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the residual of every test with its 95 % interval, ordered and coloured by evidence level.

    Args:
        evidence: One row per test, as `Verdict.evidence` returns it.
        title: Title of the figure.

    Returns:
        A plotly figure. Vertical lines mark 0 (the control, or chance if there is no control) and 1 (the base).
    """
    chart = go.Figure()
    alone = (evidence["against"] == "floor").all()
    zero, attacked = ("chance", "chance") if alone else ("control", "attacked control")
    order = [*evidence["test"].map(literal)]
    for level, rows in evidence.groupby("level", sort=False):
        known = rows[rows["rho"].notna()]
        # Some residuals have no lower bound: those below `LOWEST` are drawn at it, and the hover text has the value.
        low, high = (known[end].fillna(known["rho"]).astype(float).clip(lower=LOWEST) for end in ("low", "high"))
        rho = known["rho"].astype(float).clip(lower=LOWEST)
        chart.add_trace(
            go.Scatter(
                x=rho,
                y=known["test"].map(literal),
                mode="markers",
                marker={"color": LEVEL_COLOURS[int(str(level))], "size": 11},
                error_x=whiskers(rho, low, high),
                name=f"{level} {literal(rows['claim'].iloc[0])}",
                customdata=known[["variant", "measure", "n", "rho"]].assign(
                    variant=known["variant"].map(literal), measure=known["measure"].map(literal)
                ),
                hovertemplate="%{y}: rho %{customdata[3]:.2f}<br>strongest: %{customdata[0]}<br>%{customdata[1]}, "
                "%{customdata[2]} facts<extra></extra>",
            )
        )
    for x, text in ((0.0, zero), (1.0, "base")):
        chart.add_vline(x=x, line={"color": "#888888", "dash": "dot", "width": 1}, annotation_text=text)
    chart.update_yaxes(categoryorder="array", categoryarray=order, ticktext=order, tickvals=order)
    chart.update_xaxes(
        title_text=f"residual ρ = (attacked unlearned − {attacked}) / (base − {zero})",
        range=[LOWEST - 0.05, max(1.15, *evidence["high"].dropna().astype(float), 1.15) + 0.05],
    )
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        title={"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        width=900,
        height=170 + 34 * len(order),
        margin={"l": 170, "r": 20, "t": 80, "b": 60},
        legend={"title": {"text": "evidence level"}, "traceorder": "normal"},
    )
    return chart


def standing_figure(score: Score, rule: Rule, *, label: str) -> go.Figure:
    """Draw the score among those of the reference models, whose knowledge is known by construction.

    Args:
        score: The model's score.
        rule: The rule with its reference scores and bounds.
        label: Name of the model on the axis.

    Returns:
        A plotly figure with one row per kind of reference model, and one for the model.
    """
    chart = go.Figure()
    kinds: Mapping[str, Sequence[float]] = rule.reference
    for number, (kind, scores) in enumerate(kinds.items()):
        chart.add_trace(
            go.Box(
                x=list(scores),
                name=f"{literal(kind)} ({len(scores)})",
                boxpoints="all",
                jitter=0.6,
                pointpos=0,
                fillcolor="rgba(0,0,0,0)",
                line={"width": 0},
                marker={"color": KIND_COLOURS[number % len(KIND_COLOURS)], "size": 7, "opacity": 0.7},
                hoverinfo="x",
                showlegend=False,
            )
        )
    # The two bounds may lie so near to each other that texts on one height would overlap.
    for bound, colour, text, side, height in (
        (rule.suppressed_above, "#D55E00", "suppressed →", "top right", 0),
        (rule.margin, "#009E73", "← erased", "top left", 16),
    ):
        line = {"color": colour, "dash": "dash", "width": 1}
        chart.add_vline(
            x=bound,
            line=line,
            annotation={"text": text, "font": {"color": colour}, "yshift": height},
            annotation_position=side,
        )
    if score.value is not None:
        value, low, high = (pd.Series([end], dtype=float) for end in (score.value, score.low, score.high))
        chart.add_trace(
            go.Scatter(
                x=value,
                y=[literal(label)],
                mode="markers",
                marker={"symbol": "diamond", "size": 15, "color": "#000000"},
                error_x=whiskers(value, low, high),
                showlegend=False,
                hovertemplate="%{x:.2f}<extra></extra>",
            )
        )
    chart.update_xaxes(title_text="residual knowledge", range=[-0.02, 1.02])
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        title={
            "text": "Score among reference models of known truth",
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 16},
        },
        width=900,
        height=170 + 60 * (len(kinds) + 1),
        margin={"l": 170, "r": 20, "t": 60, "b": 60},
    )
    return chart
