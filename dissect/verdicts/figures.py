"""The figures of a verdict: the evidence of every test, and where the model stands among models of known truth."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from dissect.plotting import COLOURS, FONT, whiskers
from dissect.verdicts.rule import Rule, Score

LOWEST = -1.0
"""Where residuals are drawn that are lower still."""

KIND_COLOURS = ("#009E73", "#E69F00", "#D55E00")
"""Of models that hold nothing, a part, or all."""

LEVEL_COLOURS = {level: COLOURS[level] for level in range(5)}


def evidence_figure(evidence: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Every test's residual with its 95 % interval, up the claim ladder: 0 is a model that never knew, or chance where
    there is none, 1 the base.

    Args:
        evidence: as `Verdict.evidence` gives it.
        title: of the whole.
    """
    chart = go.Figure()
    alone = (evidence["against"] == "floor").all()
    line, nothing, attacked = ("chance",) * 3 if alone else ("never knew", "control", "attacked never")
    order = list(evidence["test"])
    for level, rows in evidence.groupby("level", sort=False):
        known = rows[rows["rho"].notna()]
        # Over-forgetting has no lower end on some measures: what is below is drawn at it, and hovering tells.
        low, high = (known[end].fillna(known["rho"]).astype(float).clip(lower=LOWEST) for end in ("low", "high"))
        rho = known["rho"].astype(float).clip(lower=LOWEST)
        chart.add_trace(
            go.Scatter(
                x=rho,
                y=known["test"],
                mode="markers",
                marker={"color": LEVEL_COLOURS[int(str(level))], "size": 11},
                error_x=whiskers(rho, low, high),
                name=f"{level} {rows['claim'].iloc[0]}",
                customdata=known[["variant", "measure", "n", "rho"]],
                hovertemplate="%{y}: rho %{customdata[3]:.2f}<br>strongest: %{customdata[0]}<br>%{customdata[1]}, "
                "%{customdata[2]} facts<extra></extra>",
            )
        )
    for x, text in ((0.0, line), (1.0, "base")):
        chart.add_vline(x=x, line={"color": "#888888", "dash": "dot", "width": 1}, annotation_text=text)
    chart.update_yaxes(categoryorder="array", categoryarray=order, ticktext=_labels(order), tickvals=order)
    chart.update_xaxes(
        title_text=f"residual ρ = (attacked unlearned − {attacked}) / (base − {nothing})",
        range=[LOWEST - 0.05, max(1.15, *evidence["high"].dropna().astype(float), 1.15) + 0.05],
    )
    chart.update_layout(
        template="plotly_white",
        font=FONT,
        title={"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        width=900,
        height=170 + 34 * len(order),
        margin={"l": 170, "r": 20, "t": 80, "b": 60},
        legend={"title": {"text": "rung of the claim ladder"}, "traceorder": "normal"},
    )
    return chart


def standing_figure(score: Score, rule: Rule, *, label: str) -> go.Figure:
    """The score among those of the models that the rule was reported on, whose truth is known by construction.

    Args:
        score: of the model.
        rule: with its reference scores and bounds.
        label: what the model is called.
    """
    chart = go.Figure()
    kinds: Mapping[str, Sequence[float]] = rule.reference
    for number, (kind, scores) in enumerate(kinds.items()):
        chart.add_trace(
            go.Box(
                x=list(scores),
                name=f"{kind} ({len(scores)})",
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
    for bound, colour, text, side in (
        (rule.suppressed_above, "#D55E00", "suppressed →", "top right"),
        (rule.erased_below, "#009E73", "← erased", "top left"),
    ):
        line = {"color": colour, "dash": "dash", "width": 1}
        chart.add_vline(
            x=bound, line=line, annotation={"text": text, "font": {"color": colour}}, annotation_position=side
        )
    if score.value is not None:
        value, low, high = (pd.Series([end], dtype=float) for end in (score.value, score.low, score.high))
        chart.add_trace(
            go.Scatter(
                x=value,
                y=[label],
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
        title={"text": "Among models whose truth is known", "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        width=900,
        height=170 + 60 * (len(kinds) + 1),
        margin={"l": 170, "r": 20, "t": 60, "b": 60},
    )
    return chart


def _labels(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]
