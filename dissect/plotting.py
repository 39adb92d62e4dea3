"""The style that all figures share, and their export for papers."""

import html
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from unlearning.common.errors import InputError
from unlearning.common.runs import file_name, write_bytes
from unlearning.common.terminal import printable

FORMATS = ("html", "pdf", "svg", "png")

# The Okabe-Ito palette, which colour-blind readers can tell apart; markers distinguish the lines in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon")

FONT = {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222222"}

DASHES = {"main": "solid", "control": "dash", "null": "dot"}
"""Line style of each arm; arms with another donor than the base are dash-dotted."""

ARM_NAMES = {"control": "control", "null": "random update"}
"""Names of arms in figures; other arms go by their own."""


def whiskers(value: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Return plotly's error bars around a value.

    Args:
        value: Heights of the points.
        low: Lower ends of the bars; NaN draws no bar.
        high: Upper ends of the bars.

    Returns:
        The `error_y` of a trace.
    """
    ends = {"array": (high - value).fillna(0), "arrayminus": (value - low).fillna(0)}
    return {"type": "data", "symmetric": False, "thickness": 1.5, **ends}


def layout(title: str, legend: str = "patched from the base") -> dict[str, Any]:
    """Return the layout that all figures share, with a title and a heading of the legend."""
    return {
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "legend": {"title": legend},
        "margin": {"l": 70, "r": 20, "t": 60, "b": 60},
    }


def faint(colour: str, alpha: float) -> str:
    """Return a colour `#rrggbb` as `rgba(...)` with the opacity `alpha`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def check_formats(formats: Sequence[str]) -> None:
    """Check the names of figure formats.

    Raises:
        InputError: A format is unknown.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"`formats` must be among {', '.join(FORMATS)}, got {name}")


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote.

    Attributes:
        paths: The files.
        problem: The reason why an image that was asked for is missing, or None.
    """

    paths: tuple[Path, ...]
    problem: str | None = None


def export(figure: go.Figure, stem: Path, *, formats: Sequence[str] = ("html",)) -> Exported:
    """Write a figure as `stem.html`, `stem.pdf` and so on; HTML is always written.

    A finished computation never fails over its picture: an image that this machine cannot export is left out.

    Args:
        figure: The figure.
        stem: Path of the files without their endings.
        formats: File formats, of `FORMATS`.

    Returns:
        The paths of the written files, and the reason why an image is missing.

    Raises:
        InputError: A format is unknown, or a file cannot be written.
    """
    check_formats(formats)
    figure = literal(figure)
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
        paths.append(stem.with_name(f"{stem.name}.{name}"))  # with_suffix would shorten `llama-3.2`
        write_bytes(paths[-1], content)
    return Exported(tuple(paths), problem)


def export_all(
    path: Path, figures: Mapping[str, go.Figure], tables: Mapping[str, pd.DataFrame], *, formats: Sequence[str]
) -> Exported:
    """Write figures, and the tables that they show as csv, into `path/figures`.

    Args:
        path: The run directory.
        figures: Figures by file name.
        tables: Tables by file name.
        formats: File formats of the figures, of `FORMATS`.

    Returns:
        The paths of the written files, and the reason why an image is missing.

    Raises:
        InputError: A format is unknown, or a file cannot be written.
    """
    written: list[Path] = []
    problem = None
    for name, figure in figures.items():
        exported = export(figure, path / "figures" / file_name(name), formats=formats)
        written += exported.paths
        problem = problem or exported.problem
    for name, table in tables.items():
        written.append(path / "figures" / f"{file_name(name)}.csv")
        write_bytes(written[-1], as_csv(table).encode())
    return Exported(tuple(written), problem)


def as_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV in which no text is a formula for a spreadsheet.

    Args:
        table: The table.

    Returns:
        The CSV. A text that begins with =, +, -, @ or white space that hides them gets an apostrophe in front, which
        spreadsheets take off; numbers stay as they are.

    Examples:
        >>> import pandas as pd
        >>> as_csv(pd.DataFrame({"group": ["=1+1", "Oslo"], "krs": [-0.5, 1.0]})).splitlines()
        ['group,krs', "'=1+1,-0.5", 'Oslo,1.0']
    """
    shown = table.map(_no_formula)
    shown.columns = [_no_formula(name) for name in table.columns]
    return str(shown.to_csv(index=False))


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # a lone \r is not quoted, and begins a new cell
    return f"'{cell}" if _FORMULA.match(cell) else cell


_FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@]")

_OWN_TAG = re.compile(r"</?(?:b|i|sub|sup|extra)>|<br ?/?>")
"""Markup of plotly that the figures of this package use themselves."""

_NAMES = {"name", "text", "hovertext", "title", "label"}
_DATA = {"customdata", "text", "hovertext", "x", "y", "ticktext", "tickvals", "categoryarray", "labels"}
"""Properties that hold data if they are lists; a text by itself may be this package's own."""


def literal(figure: go.Figure) -> go.Figure:
    """Return a copy of a figure that shows names, groups and prompts as they are, without reading markup in them.

    Args:
        figure: The figure; plotly reads a subset of HTML in its texts, such as links.

    Returns:
        The copy. Lists of texts are data and escaped whole; other texts keep the tags that this package writes.
    """
    return go.Figure(_literal(figure.to_plotly_json()))


def _literal(value: Any, key: str = "", *, is_data: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _literal(item, name) for name, item in value.items()}
    if isinstance(value, str):
        if is_data or key in _NAMES:
            value = printable(value)  # no sign that turns the direction of what follows
        if is_data:
            return html.escape(value, quote=False)
        return _without_foreign_tags(value) if key in _NAMES or key == "hovertemplate" else value
    if isinstance(value, list | tuple):
        return [_literal(item, key, is_data=is_data or key in _DATA) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        return _literal(value.tolist(), key, is_data=is_data)
    return value


def _without_foreign_tags(text: str) -> str:
    """Escape every < that begins no tag of this package's own."""
    kept = [*_OWN_TAG.finditer(text)]
    starts = {found.start() for found in kept}
    return "".join("&lt;" if sign == "<" and place not in starts else sign for place, sign in enumerate(text))


def _export_problem(error: Exception) -> str:
    if importlib.util.find_spec("kaleido") is None:
        return "pdf, svg and png need kaleido: pip install 'dissect-unlearning[export]'"
    text = str(error).strip()
    if type(error).__name__ == "ChromeNotFoundError" or "Chrome" in text:
        return "pdf, svg and png need Chromium: apt-get install chromium, or run plotly_get_chrome"
    return f"the image export failed: {text.splitlines()[0] if text else type(error).__name__}"
