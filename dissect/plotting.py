"""The style that all figures share, and their export for papers."""

import html
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        "title": {"text": literal(title), "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "template": "plotly_white",
        "font": FONT,
        "legend": {"title": literal(legend)},
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


def literal(text: object) -> str:
    """Return a text that plotly shows as it is.

    Plotly reads its texts as a small HTML (tags, links, entities), fills in `%{...}`, and sets what stands between two
    `$` as a formula. Figures put every name that a user, a model or a file gave through this function.

    Args:
        text: A name, group, prompt or title.

    Returns:
        The text for titles, names, ticks, annotations, hover texts and their templates. Signs that steer a terminal or
        turn the direction of what follows are replaced by a visible one.

    Examples:
        >>> literal("<b>Oslo</b> & %{x}")
        '&lt;b&gt;Oslo&lt;/b&gt; &amp; %&#123;x}'
    """
    return html.escape(printable(str(text)), quote=False).replace("%{", "%&#123;").replace("$", "&#36;")


def _export_problem(error: Exception) -> str:
    if importlib.util.find_spec("kaleido") is None:
        return "pdf, svg and png need kaleido: pip install 'dissect-unlearning[export]'"
    text = str(error).strip()
    if type(error).__name__ == "ChromeNotFoundError" or "Chrome" in text:
        return "pdf, svg and png need Chromium: apt-get install chromium, or run plotly_get_chrome"
    return f"the image export failed: {text.splitlines()[0] if text else type(error).__name__}"
