"""The figures of NPO's synthetic experiment: medians over the seeds, with the range of the seeds as a band."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.npo_synthetic.drawing import (
    draw_band,
    draw_line,
    draw_mark,
    draw_name,
    finish,
    log_axis,
    over_seeds,
    power_of_ten,
    spread,
    thinned,
    with_margin,
)
from dissect.plotting import COLOURS, literal, whiskers

FAMILIES: dict[str, tuple[str, ...]] = {
    "gradient ascent": ("GA", "GA+RT", "GA+KL"),
    "NPO": ("NPO", "NPO+RT", "NPO+KL"),
    "DPO": ("DPO", "DPO+RT", "DPO+KL"),
    "IDK and KTO": ("IDK+RT", "KTO"),
}
FAMILY_COLOURS = dict(zip(FAMILIES, (COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3]), strict=True))
BETA_COLOURS = ("#5BA3D0", "#3E8BC4", "#2171B5", "#08519C", "#08244D")
"""From the smallest beta to the largest."""
GUIDE = "#888888"
AXES = {
    "forget_distance": "forget distance (nats)",
    "retain_distance": "retain distance (nats)",
    "forget_kl": "KL(fine-tuned ‖ model) on forget inputs (nats)",
}
DISTANCES = ("forget_distance", "retain_distance")
BANDS = "median of the seeds, band: their range"


def figures(comparison: pd.DataFrame, limit: pd.DataFrame, fits: pd.DataFrame) -> dict[str, go.Figure]:
    """Draw all figures.

    Args:
        comparison: Results of the methods for every alpha.
        limit: Results of NPO with every beta, and of gradient ascent.
        fits: Table of `analyses.npo_synthetic.fits.growth_table`.

    Returns:
        The figures by file name.
    """
    made = {
        f"distances_alpha{alpha:g}": distance_figure(comparison[comparison["alpha"] == alpha], alpha)
        for alpha in comparison["alpha"].unique()
    }
    made["tradeoff"] = tradeoff_figure(comparison)
    made["limit"] = limit_figure(limit)
    made["growth"] = growth_figure(limit, fits)
    return made


def distance_figure(comparison: pd.DataFrame, alpha: float) -> go.Figure:
    """Draw forget and retain distance over the steps, one column per family of methods, with all others in grey behind.

    Args:
        comparison: Rows of one alpha.
        alpha: The alpha, for the title.

    Returns:
        The figure.
    """
    figure = make_subplots(
        rows=2,
        cols=len(FAMILIES),
        column_titles=list(FAMILIES),
        shared_xaxes=True,
        shared_yaxes="rows",
        horizontal_spacing=0.055,
        vertical_spacing=0.06,
    )
    last = int(comparison["step"].max())
    for row, metric in enumerate(DISTANCES, start=1):
        table = over_seeds(comparison, ("method", "step"), metric)
        curves = {str(name): curve for name, curve in table.groupby("method", sort=False)}
        low, high = with_margin(table["low"].min(), table["high"].max(), 0.05)
        for column, (family, methods) in enumerate(FAMILIES.items(), start=1):
            place, colour = (row, column), FAMILY_COLOURS[family]
            for name in set(curves) - set(methods):
                draw_line(figure, curves[name], name, {"color": "#DDDDDD", "width": 1}, place, is_background=True)
            ends = [power_of_ten(curves[name]["median"].iloc[-1]) for name in methods]
            for name, height in zip(methods, spread(ends, gap=0.075 * (high - low)), strict=True):
                draw_band(figure, curves[name], colour, place)
                draw_line(figure, curves[name], name, {"color": colour, "width": 2, "dash": _dash(name)}, place)
                draw_name(figure, name, last, height, colour, place)
            figure.update_yaxes(**log_axis(low, high), row=row, col=column)
            figure.update_xaxes(range=[0, 1.3 * last], nticks=5, row=row, col=column)
        figure.update_yaxes(title_text=AXES[metric], row=row, col=1)
    figure.update_xaxes(title_text="unlearning step", row=2)
    title = f"Distance from the retrained model, α = {alpha:g}: {_inputs(alpha)}"
    return finish(figure, title, f"{BANDS}; grey: the other methods; lower is better", height=720)


def tradeoff_figure(comparison: pd.DataFrame) -> go.Figure:
    """Forget against retain distance: the medians' path from the fine-tuned model, a panel an alpha."""
    alphas = list(comparison["alpha"].unique())
    titles = [f"α = {alpha:g}: {_inputs(alpha)}" for alpha in alphas]
    figure = make_subplots(rows=1, cols=len(alphas), subplot_titles=titles, horizontal_spacing=0.09)
    colours = {name: FAMILY_COLOURS[family] for family, methods in FAMILIES.items() for name in methods}
    for column, alpha in enumerate(alphas, start=1):
        place = (1, column)
        rows = comparison[comparison["alpha"] == alpha]
        paths = rows.groupby(["method", "step"], sort=False)[list(DISTANCES)].median().reset_index()
        curves = {str(name): curve for name, curve in paths.groupby("method", sort=False)}
        (left, right), (low, high) = (with_margin(paths[name].min(), paths[name].max(), 0.12) for name in DISTANCES)
        ends = {name: [power_of_ten(curve[axis].iloc[-1]) for axis in DISTANCES] for name, curve in curves.items()}
        heights = spread([y for _, y in ends.values()], gap=0.042 * (high - low))
        for (name, curve), height in zip(curves.items(), heights, strict=True):
            line = {"color": colours[name], "width": 2, "dash": _dash(name)}
            draw_line(figure, curve, name, line, place, axes=DISTANCES)
            x, y = ends[name]
            draw_mark(figure, (10**x, 10**y), _symbol(name), colours[name], place)
            draw_name(figure, name, x, height, colours[name], place, shift=9)
        start_x, start_y = (power_of_ten(paths[axis].iloc[0]) for axis in DISTANCES)
        draw_mark(figure, (10**start_x, 10**start_y), "circle-open", "#000000", place)
        draw_name(figure, "start", start_x, start_y - 0.045 * (high - low), "#000000", place)
        figure.update_xaxes(**log_axis(left, right), title_text=AXES["forget_distance"], row=1, col=column)
        figure.update_yaxes(**log_axis(low, high), row=1, col=column)
    figure.update_yaxes(title_text=AXES["retain_distance"], row=1, col=1)
    subtitle = f"medians over the seeds; marks at step {int(comparison['step'].max())}; lower left is better"
    return finish(figure, "What forgetting costs", subtitle, height=640)


def limit_figure(limit: pd.DataFrame) -> go.Figure:
    """Divergence on forget inputs and retain distance over the steps, a line a beta, and gradient ascent."""
    titles = ["divergence from the fine-tuned model", "damage to what is kept"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    drawn = limit[limit["step"] >= 0.01 * limit["step"].max()]
    for column, metric in enumerate(("forget_kl", "retain_distance"), start=1):
        table = over_seeds(drawn, ("method", "beta", "step"), metric)
        top = float(table["high"].max())
        bottom = 1e-5 * top if metric == "forget_kl" else float(table["low"].min())
        _draw_betas(figure, table, column, with_margin(bottom, top, 0.04))
        figure.update_yaxes(title_text=AXES[metric], row=1, col=column)
    return finish(figure, "NPO goes to gradient ascent as β goes to 0 (α = 1)", BANDS, height=580)


def growth_figure(limit: pd.DataFrame, fits: pd.DataFrame) -> go.Figure:
    """Draw the rate at which the divergence grows (flat for a line, 1 / step for a logarithm) and the fitted powers."""
    titles = ["rate of growth: flat for a line, ∝ 1 / step for a logarithm", "power of the step in the rate"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    runs = [thinned(run) for _, run in limit.groupby(["method", "beta", "seed"], sort=False, dropna=False)]
    rates = pd.concat([run.assign(rate=run["forget_kl"].diff() / run["step"].diff()).iloc[1:] for run in runs])
    last = int(limit["step"].max())
    table = over_seeds(rates[rates["step"] >= 0.1 * last], ("method", "beta", "step"), "rate")
    low, high = with_margin(table["median"].clip(1e-6 * table["high"].max()).min(), table["high"].max(), 0.1)
    low -= 0.25
    _draw_betas(figure, table, 1, (low, high))
    steps = np.array([0.3 * last, last])
    slope = pd.DataFrame({"step": steps, "median": 10 ** (low + 0.1) * last / steps})
    draw_line(figure, slope, "", {"color": GUIDE, "dash": "dot", "width": 2}, (1, 1), is_background=True)
    draw_name(figure, "∝ 1 / step", np.log10(last), low + 0.1, GUIDE, (1, 1))
    figure.update_yaxes(title_text="growth of the KL on forget inputs (nats a step)", row=1, col=1)
    _draw_powers(figure, fits[(fits["metric"] == "forget_kl") & (fits["quantity"] == "rate_power")])
    subtitle = f"left: {BANDS}; right: mean over the seeds, 95 % interval"
    return finish(figure, "Does the divergence grow as a line or as a logarithm? (α = 1)", subtitle, height=580)


def _draw_powers(figure: go.Figure, powers: pd.DataFrame) -> None:
    """Draw mean and interval of every method and range of steps, with the two laws."""
    n_methods = len(powers) // powers["first_step"].nunique()
    for number, (first, rows) in enumerate(powers.groupby("first_step", sort=True)):
        figure.add_trace(
            go.Scatter(
                x=np.arange(n_methods) + 0.2 * number - 0.1,
                y=rows["mean"],
                error_y=whiskers(rows["mean"], rows["low"], rows["high"]),
                mode="markers",
                name=literal(f"steps {first} to {rows['last_step'].iloc[0]}"),
                marker={"size": 10, "color": "#222222", "symbol": ("circle", "square-open")[number % 2]},
                hovertemplate="%{y:.3f}<extra></extra>",
            ),
            row=1,
            col=2,
        )
    names = [name for name, _, _ in _by_beta(powers[powers["first_step"] == powers["first_step"].min()])]
    for law, level in (("linear: 0", 0.0), ("logarithmic: −1", -1.0)):
        ends = pd.DataFrame({"step": [-0.5, n_methods - 0.5], "median": [level, level]})
        draw_line(figure, ends, law, {"color": GUIDE, "dash": "dot", "width": 2}, (1, 2), is_background=True)
        draw_name(figure, law, n_methods - 0.5, level, GUIDE, (1, 2), shift=3)
    figure.update_xaxes(
        tickvals=list(range(n_methods)),
        ticktext=[*map(literal, names)],
        range=[-0.5, n_methods + 0.7],
        zeroline=False,
        row=1,
        col=2,
    )
    figure.update_yaxes(title_text="power of the step in the rate of growth", zeroline=False, row=1, col=2)
    figure.update_layout(legend={"x": 0.58, "y": 0.03, "yanchor": "bottom"})


def _draw_betas(figure: go.Figure, table: pd.DataFrame, column: int, ends: tuple[float, float]) -> None:
    """Lines over the steps on logarithmic axes, named where they end; `ends` are powers of ten."""
    first, last = power_of_ten(table["step"].min()), power_of_ten(table["step"].max())
    lines = [(name, colour, thinned(curve)) for name, colour, curve in _by_beta(table)]
    heights = [power_of_ten(curve["median"].iloc[-1]) for _, _, curve in lines]
    for (name, colour, curve), height in zip(lines, spread(heights, gap=0.045 * (ends[1] - ends[0])), strict=True):
        draw_band(figure, curve, colour, (1, column))
        draw_line(figure, curve, name, {"color": colour, "width": 2}, (1, column))
        draw_name(figure, name, last, height, colour, (1, column))
    right = last + 0.18 * (last - first)
    figure.update_xaxes(**log_axis(first, right), title_text="unlearning step", row=1, col=column)
    figure.update_yaxes(**log_axis(*ends), row=1, col=column)


def _by_beta(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield name, colour and rows of gradient ascent and of every beta."""
    ascent = table[table["beta"].isna()]
    yield str(ascent["method"].iloc[0]), FAMILY_COLOURS["gradient ascent"], ascent
    betas = sorted(table["beta"].dropna().unique())
    for number, beta in enumerate(betas):
        yield f"β = {beta:g}", BETA_COLOURS[number % len(BETA_COLOURS)], table[table["beta"] == beta]


def _inputs(alpha: float) -> str:
    return "forget and retain inputs apart" if alpha else "forget and retain inputs alike"


def _dash(name: str) -> str:
    return {"RT": "dash", "KL": "dot"}.get(name.partition("+")[2], "solid")


def _symbol(name: str) -> str:
    return {"RT": "square", "KL": "diamond"}.get(name.partition("+")[2], "circle")
