"""Every analysis is run as a module: `python -m analyses.NAME`."""

import subprocess
import sys
from pathlib import Path

import pytest

ANALYSES = [
    "defaults",
    "dissecting",
    "muse_runs",
    "npo_synthetic",
    "resistance",
    "tofu_pair",
    "tofu_pair.verdicts",
    "tradeoff",
    "unlearning_methods",
    "verdict_benchmark",
]


@pytest.mark.parametrize("name", ANALYSES)
def test_help_shows_an_example_of_the_command_itself(name: str) -> None:
    shown = subprocess.run([sys.executable, "-m", f"analyses.{name}", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"python -m analyses.{name}" in shown.stdout


def test_every_analysis_is_listed() -> None:
    folder = Path(__file__).parents[2] / "analyses"
    packages = {path.parent.name for path in folder.glob("*/__main__.py")}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert packages | modules == {name for name in ANALYSES if "." not in name}
