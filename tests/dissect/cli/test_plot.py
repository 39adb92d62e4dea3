"""`dissect plot`: draws a finished run again, and refuses what is none."""

import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest

from tests.dissect.cli.helpers import Outcome, World, assert_refused, call, cut_short

FIGURES = ["krs.html", "difference.html", "examples.html", "krs.csv", "difference.csv"]


@pytest.fixture
def run(finished: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A finished run of one's own, its figures lost."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "figures")
    return tmp_path / "run"


def test_plot_writes_the_figures_again(run: Path) -> None:
    outcome = call("plot", run)
    written = [run / "figures" / name for name in FIGURES]
    assert outcome == Outcome(0, "".join(f"{path}\n" for path in written), "")
    assert all(path.stat().st_size > 100 for path in written)


def test_plot_quiet_says_nothing(run: Path) -> None:
    assert call("plot", run, "--quiet") == Outcome(0, "", "")


def test_plot_without_chromium_succeeds_and_says_in_one_line_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    outcome = call("plot", run, "--format", "html,pdf", "--json")
    assert outcome.code == 0
    assert (
        outcome.err == "dissect: pdf, svg and png need Chromium: apt-get install chromium, or run plotly_get_chrome\n"
    )
    told = json.loads(outcome.out)
    assert [Path(path).name for path in told["figures"]] == FIGURES
    assert told["problem"] in outcome.err


def test_patch_without_chromium_succeeds_and_says_in_one_line_how_to_get_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    outcome = call(*world.patch(tmp_path / "run", "--format", "pdf", "--json"))
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert "need Chromium" in outcome.err
    assert [Path(path).name for path in json.loads(outcome.out)["figures"]] == ["krs.html", "examples.html", "krs.csv"]


def test_plot_of_an_unknown_format_is_refused(run: Path) -> None:
    assert_refused(call("plot", run, "--format", "html,bmp"), "--format", "html, pdf, svg, png", "bmp", "bmp")
    assert not (run / "figures").exists()


def test_plot_of_an_unfinished_run_is_refused(run: Path) -> None:
    file = run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))
    assert_refused(call("plot", run), f"{run}: the run is not finished", "rerun the same `dissect patch` command")


def test_plot_of_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert_refused(call("plot", tmp_path), f"{tmp_path}: not a run directory")
    assert_refused(call("plot", tmp_path / "nothing"), f"{tmp_path / 'nothing'}: not a run directory")
    (tmp_path / "file").write_text("text")
    assert_refused(call("plot", tmp_path / "file"), f"{tmp_path / 'file'}: not a run directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_plot_of_a_run_with_a_broken_table_is_refused(run: Path) -> None:
    cut_short(run / "results.parquet")
    assert_refused(call("plot", run), f"{run / 'results.parquet'}: cannot be read")
    (run / "results.parquet").unlink()
    assert_refused(call("plot", run), f"{run / 'results.parquet'}: cannot be read")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 2, "status": "", "configuration": {}}'])
def test_plot_of_a_broken_record_is_refused(run: Path, content: str) -> None:
    (run / "run.json").write_text(content)
    assert_refused(call("plot", run), str(run / "run.json"))
