"""Figures are pure functions of tables; files are what they claim to be, or one line says what is missing."""

import importlib.util
import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from pandas.testing import assert_frame_equal

from dissect.plotting import COLOURS, MARKERS, as_csv, check_formats, export, export_all
from dissect.sweeps.figures import difference_figure, example_heatmap, recovery_figure
from dissect.sweeps.result import SweepResult, load_result
from tests.dissect.cli.helpers import Outcome, unfinished_files
from unlearning.common.errors import InputError

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
"""Okabe and Ito, Color Universal Design (2008)."""

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]

needs_chromium = pytest.mark.skipif(
    not any(shutil.which(name) for name in BROWSERS), reason="no Chromium here: pdf, svg and png cannot be exported"
)


@pytest.fixture(scope="module")
def result(finished: tuple[Path, Outcome]) -> SweepResult:
    """A finished sweep of three sets of sites with a control."""
    return load_result(finished[0])


def lines(figure: go.Figure) -> list[Any]:
    """The traces that are curves."""
    return [trace for trace in figure.data if trace.mode == "lines+markers"]


def bands(figure: go.Figure) -> list[Any]:
    """The traces that are intervals."""
    return [trace for trace in figure.data if trace.fill == "toself"]


def test_recovery_figure_has_a_line_per_site_and_target_with_the_table_s_numbers(result: SweepResult) -> None:
    curve = result.curve()
    traces = {(trace.name, trace.line.dash): trace for trace in lines(recovery_figure(curve))}
    assert len(traces) == 6
    for site in ("mlp_coef", "attn_out", "mlp_coef+attn_out"):
        for target, key in (("unlearned", (site, "solid")), ("control", (f"{site}, control", "dash"))):
            table = curve[(curve["site"] == site) & (curve["target"] == target)]
            assert list(traces[key].x) == table["centre"].tolist() == [0, 1, 2]
            assert list(traces[key].y) == table["krs"].tolist()


def test_recovery_figure_draws_intervals_as_bands_of_the_line_s_colour(result: SweepResult) -> None:
    curve = result.curve()
    figure = recovery_figure(curve)
    by_group = {trace.legendgroup: trace for trace in lines(figure)}
    assert len(bands(figure)) == 6
    for band in bands(figure):
        line = by_group[band.legendgroup]
        red, green, blue = (int(line.line.color[i : i + 2], 16) for i in (1, 3, 5))
        assert band.fillcolor.startswith(f"rgba({red},{green},{blue},0.")
        assert not band.showlegend
        site, _, arm = band.legendgroup.partition(", ")
        table = curve[(curve["site"] == site) & (curve["arm"] == ("control" if arm else "main"))]
        upper, lower = band.y[:3], band.y[:2:-1]
        assert list(upper) == table["krs_high"].tolist()
        assert list(lower) == table["krs_low"].tolist()
        assert list(band.x) == [0, 1, 2, 2, 1, 0]
        assert all(low <= krs <= high for low, krs, high in zip(lower, line.y, upper, strict=True))


def test_recovery_figure_without_a_control_has_no_dashed_line(result: SweepResult) -> None:
    curve = result.curve()
    figure = recovery_figure(curve[curve["target"] == "unlearned"])
    assert [trace.line.dash for trace in lines(figure)] == ["solid"] * 3


def test_recovery_figure_without_intervals_keeps_its_lines(result: SweepResult) -> None:
    curve = result.curve().assign(krs_low=np.nan, krs_high=np.nan)
    figure = recovery_figure(curve)
    assert (len(lines(figure)), len(bands(figure))) == (6, 0)


def test_recovery_figure_says_what_its_axes_are(result: SweepResult) -> None:
    figure = recovery_figure(result.curve(), title="base → npo, window 3")
    assert figure.layout.xaxis.title.text == "centre layer of the window"
    assert figure.layout.yaxis.title.text == "knowledge recovery score (KRS)"
    assert figure.layout.title.text == "base → npo, window 3"
    assert {shape.y0 for shape in figure.layout.shapes} == {0, 1}


def test_lines_are_told_apart_by_colour_blind_readers_and_in_grey(result: SweepResult) -> None:
    assert set(COLOURS) <= OKABE_ITO
    assert len(set(COLOURS)) == len(set(MARKERS)) == len(COLOURS)
    drawn = [
        (trace.line.color, trace.line.dash, trace.marker.symbol) for trace in lines(recovery_figure(result.curve()))
    ]
    without_colour = [(dash, marker) for _, dash, marker in drawn]
    assert len(set(without_colour)) == 6
    assert len({colour for colour, _, _ in drawn}) == 3  # a site and its control share the colour


def test_example_heatmap_holds_every_example_s_score(result: SweepResult) -> None:
    frame = result.frame.sample(frac=1, random_state=0)  # the order of rows must not matter
    figure = example_heatmap(frame)
    panels = {note.text: trace for note, trace in zip(figure.layout.annotations, figure.data, strict=True)}
    assert set(panels) == {"mlp_coef", "attn_out", "mlp_coef+attn_out"}
    for site, panel in panels.items():
        for example, centre in itertools.product(range(6), range(3)):
            cell = frame[
                (frame["target"] == "unlearned")
                & (frame["site"] == site)
                & (frame["example_index"] == example)
                & (frame["centre"] == centre)
            ]
            assert panel.z[example][centre] == cell["krs"].item()
            assert panel.text[example][centre] == cell["example"].item() == f"q{example}"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_figures_leave_their_tables_as_they_were(result: SweepResult) -> None:
    curve, frame = result.curve().copy(), result.frame.copy()
    first = (recovery_figure(curve, title="a"), example_heatmap(frame, title="a"))
    second = (recovery_figure(curve, title="a"), example_heatmap(frame, title="a"))
    assert_frame_equal(curve, result.curve())
    assert_frame_equal(frame, result.frame)
    for ours, again in zip(first, second, strict=True):
        assert ours.to_json() == again.to_json()


def test_html_stands_on_its_own(result: SweepResult, tmp_path: Path) -> None:
    exported = export(result.figure(), tmp_path / "deep" / "krs", formats=[])
    assert exported.paths == (tmp_path / "deep" / "krs.html",)
    assert exported.problem is None
    page = exported.paths[0].read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!doctype html>")
    assert "knowledge recovery score (KRS)" in page
    assert 'src="http' not in page  # plotly itself is in the page: it opens without a network
    assert len(page) > 1_000_000
    assert unfinished_files(tmp_path) == []


def test_stem_with_a_dot_keeps_its_name(result: SweepResult, tmp_path: Path) -> None:
    exported = export(result.figure(), tmp_path / "llama-3.2")
    assert [path.name for path in exported.paths] == ["llama-3.2.html"]


@needs_chromium
def test_images_are_what_they_claim_to_be(result: SweepResult, tmp_path: Path) -> None:
    exported = export(result.figure(), tmp_path / "krs", formats=["pdf", "svg", "png", "html", "png"])
    assert exported.problem is None
    assert {path.name for path in exported.paths} == {"krs.html", "krs.pdf", "krs.svg", "krs.png"}
    assert (tmp_path / "krs.pdf").read_bytes().startswith(b"%PDF-")
    assert (tmp_path / "krs.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    drawing = (tmp_path / "krs.svg").read_text()
    assert drawing.startswith("<svg")
    assert "knowledge recovery score (KRS)" in drawing


class ChromeNotFoundError(RuntimeError):
    """Named as kaleido's."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ChromeNotFoundError(), "need Chromium: apt-get install chromium"),
        (
            RuntimeError("\n\nKaleido requires Google Chrome to be installed."),
            "need Chromium: apt-get install chromium",
        ),
        (ValueError("the browser hung\nand more"), "the image export failed: the browser hung"),
        (OSError(), "the image export failed: OSError"),
    ],
)
def test_image_that_cannot_be_exported_leaves_the_page_and_a_reason(
    result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> bytes:
        raise error

    monkeypatch.setattr(go.Figure, "to_image", fail)
    exported = export(result.figure(), tmp_path / "krs", formats=["html", "pdf", "png"])
    assert [path.name for path in exported.paths] == ["krs.html"]
    assert exported.problem is not None
    assert words in exported.problem
    assert "\n" not in exported.problem


def test_image_without_kaleido_says_how_to_install_it(
    result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> bytes:
        raise ValueError("Image export using the 'kaleido' engine requires the Kaleido package")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "kaleido" else find(name))
    exported = export(result.figure(), tmp_path / "krs", formats=["pdf"])
    assert exported.problem == "pdf, svg and png need kaleido: pip install 'dissect-unlearning[export]'"


def test_unknown_format_is_refused_before_anything_is_written(result: SweepResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="formats.*jpeg"):
        export(result.figure(), tmp_path / "krs", formats=["html", "jpeg"])
    assert list(tmp_path.iterdir()) == []
    check_formats(["html", "pdf", "svg", "png"])


def test_table_of_the_figure_is_written_beside_it(finished: tuple[Path, Outcome], result: SweepResult) -> None:
    for name, told in (("krs", result.curve()), ("difference", result.contrast())):
        table = pd.read_csv(finished[0] / "figures" / f"{name}.csv", dtype={"window": str})
        assert_frame_equal(table, told, check_dtype=False)


def curve_of(*kinds: str) -> pd.DataFrame:
    """A curve of two sites and three arms in windows of these kinds, every number another."""
    rows = [
        {
            **{"arm": arm, "target": "unlearned", "donor": donor, "site": site, "window": kind, "centre": centre},
            **{"first_layer": centre, "last_layer": 2 if kind == "suffix" else centre, "n": 4},
        }
        for arm, donor in (("main", "base"), ("null", "base"), ("donor", "never"))
        for site in ("value_vectors", "embed")
        for kind in (("all",) if site == "embed" else kinds)
        for centre in (range(1, 2) if kind == "all" else range(3))
    ]
    table = pd.DataFrame(rows)
    return table.assign(krs=np.arange(len(table)) / 100, krs_low=-0.1, krs_high=0.9)


def test_every_kind_of_window_has_its_panel_and_what_has_one_window_another() -> None:
    curve = curve_of("3", "1", "suffix")
    figure = recovery_figure(curve)
    assert [note.text for note in figure.layout.annotations] == [
        *["windows of 3", "single layers", "suffix: layer l to the last", "one window"]
    ]
    assert [figure.layout[f"xaxis{n}"].title.text for n in ("", 2, 3)] == [
        *["centre layer of the window"] * 2,
        "first layer of the suffix",
    ]
    drawn = [(trace.name, trace.line.dash, trace.xaxis, list(trace.y)) for trace in lines(figure)]
    for number, kind in enumerate(("3", "1", "suffix"), start=1):
        for arm, name, dash in (
            ("main", "value_vectors", "solid"),
            ("null", "value_vectors, random update", "dot"),
            ("donor", "value_vectors, from never", "dashdot"),
        ):
            cell = curve[(curve["arm"] == arm) & (curve["site"] == "value_vectors") & (curve["window"] == kind)]
            assert (name, dash, f"x{number}" if number > 1 else "x", cell["krs"].tolist()) in drawn
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert [(trace.name, list(trace.x)) for trace in points] == [
        *[("embed", ["embed"]), ("embed, random update", ["embed"]), ("embed, from never", ["embed"])]
    ]
    for trace, arm in zip(points, ("main", "null", "donor"), strict=True):
        cell = curve[(curve["arm"] == arm) & (curve["site"] == "embed")].iloc[0]
        assert (trace.y[0], trace.error_y.array[0]) == (cell["krs"], pytest.approx(0.9 - cell["krs"]))
        assert trace.error_y.arrayminus[0] == pytest.approx(cell["krs"] + 0.1)
    named = [trace.name for trace in figure.data if trace.showlegend is not False and trace.fill is None]
    assert len(named) == len(set(named)) == 6  # a line of several panels stands in the legend once


def test_difference_figure_has_a_row_of_panels_for_every_other_arm(result: SweepResult) -> None:
    contrast = result.contrast()
    others = [contrast.assign(arm=arm, difference=contrast["difference"] + 1) for arm in ("null", "noise")]
    figure = difference_figure(pd.concat([contrast, *others]))
    titles = [figure.layout[f"yaxis{n}"].title.text for n in ("", 2, 3)]
    assert titles == ["KRS − control", "KRS − random update", "KRS − noise"]
    by_panel = {(trace.yaxis, trace.name): list(trace.y) for trace in lines(figure)}
    assert len(by_panel) == 3 * 3
    for site in ("mlp_coef", "attn_out", "mlp_coef+attn_out"):
        told = contrast[contrast["site"] == site]["difference"]
        assert by_panel["y", site] == told.tolist()
        assert by_panel["y3", site] == (told + 1).tolist()


LINK = '<a href="http://evil">x</a><script>alert(1)</script> & <b>y</b>'


def test_a_page_holds_no_element_of_a_name(tmp_path: Path) -> None:
    figure = go.Figure(go.Bar(x=[LINK], y=[1.0], name=LINK), layout={"title": {"text": LINK}})
    exported = export_all(tmp_path, {"../a b": figure}, {"../a b": pd.DataFrame({"x": [1]})}, formats=["html"])
    assert all(path.parent == tmp_path / "figures" for path in exported.paths)
    assert "<script>alert(1)" not in exported.paths[0].read_text()


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", "=cmd|' /C calc'!A0"]
)
def test_no_cell_is_a_formula(text: str) -> None:
    table = pd.DataFrame({"group": [text, "Oslo"], text: [-0.5, float("nan")]})
    read = pd.read_csv(io.StringIO(as_csv(table)))
    shown = text.replace("\r", "\n")
    assert read.iloc[0, 0] == f"'{shown}" and read.columns[1] == f"'{shown}"
    assert read.iloc[1, 0] == "Oslo" and read.iloc[0, 1] == -0.5 and np.isnan(read.iloc[1, 1])


def test_no_line_of_a_cell_becomes_a_cell_of_its_own() -> None:
    text = as_csv(pd.DataFrame({"group": ["Oslo\r=1+1", "Oslo\r\n=1+1"]}))
    assert pd.read_csv(io.StringIO(text))["group"].tolist() == ["Oslo\n=1+1"] * 2


def test_csv_of_plain_tables_is_pandas_own() -> None:
    table = pd.DataFrame({"site": ["mlp_coef", None], "krs": [-0.25, 1e-9], "n": [1, 2], "ok": [True, False]})
    assert as_csv(table) == table.to_csv(index=False)
