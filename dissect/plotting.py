"""Figures as pure functions of result tables, and their export for papers."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from unlearning.common.errors import InputError
from unlearning.common.runs import write_bytes

FORMATS = ("html", "pdf", "svg", "png")

# Okabe-Ito: told apart by colour-blind readers; the markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon")

FONT = {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222222"}


DASHES = {"main": "solid", "control": "dash", "null": "dot"}
"""Other arms, which give something else than the base's activations, are dash-dotted."""
ARM_NAMES = {"control": "never-trained control", "null": "random update"}


def whiskers(value: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Plotly's error bars from `low` to `high` around `value`; none where an end is unknown."""
    ends = {"array": (high - value).fillna(0), "arrayminus": (value - low).fillna(0)}
    return {"type": "data", "symmetric": False, "thickness": 1.5, **ends}


def layout(title: str, legend: str = "patched from the base") -> dict[str, Any]:
    return {
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "legend": {"title": legend},
        "margin": {"l": 70, "r": 20, "t": 60, "b": 60},
    }


def faint(colour: str, alpha: float) -> str:
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


def export_all(
    path: Path, figures: Mapping[str, go.Figure], tables: Mapping[str, pd.DataFrame], *, formats: Sequence[str]
) -> Exported:
    """Write figures and the tables that they show, as csv, into `path/figures`, each under its name; see `export`."""
    written: list[Path] = []
    problem = None
    for name, figure in figures.items():
        exported = export(figure, path / "figures" / name, formats=formats)
        written += exported.paths
        problem = problem or exported.problem
    for name, table in tables.items():
        written.append(path / "figures" / f"{name}.csv")
        write_bytes(written[-1], table.to_csv(index=False).encode())
    return Exported(tuple(written), problem)


def _export_problem(error: Exception) -> str:
    if importlib.util.find_spec("kaleido") is None:
        return "pdf, svg and png need kaleido: pip install 'dissect-unlearning[export]'"
    text = str(error).strip()
    if type(error).__name__ == "ChromeNotFoundError" or "Chrome" in text:
        return "pdf, svg and png need Chromium: apt-get install chromium, or run plotly_get_chrome"
    return f"the image export failed: {text.splitlines()[0] if text else type(error).__name__}"
