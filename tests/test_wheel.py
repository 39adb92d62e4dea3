"""The wheel works where nothing of the repository is: a clean virtual environment, another directory."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_MODELS = 20e6
"""Bytes that the built-in models may take in the wheel."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tracked files, as a fresh clone has them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=tracked, check=True)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(out), str(source))
    return next(out.glob("*.whl"))


def pip(python: str | Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


@pytest.mark.slow
def test_wheel_holds_two_packages_and_small_models(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel).infolist()
    assert {file.filename.split("/")[0] for file in files if ".dist-info" not in file.filename} == {
        "dissect",
        "unlearning",
    }
    names = {file.filename for file in files}
    assert {"dissect/py.typed", "unlearning/py.typed"} <= names
    assert 0 < sum(file.compress_size for file in files if "zoo/models" in file.filename) <= LARGEST_MODELS


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python, constraints = home / "bin" / "python", str(ROOT / "constraints.txt")
    pip(python, "install", "-c", constraints, "torch")
    pip(python, "install", "-c", constraints, str(wheel))

    def run(*command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        done = subprocess.run(
            [str(home / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pair = ("--base", "demo:base", "--unlearned", "demo:npo")
    run("dissect", "patch", *pair, "--out", "patched")
    assert (tmp_path / "patched" / "results.parquet").is_file()
    found = json.loads(run("dissect", "verdict", *pair, "--budget", "quick", "--json"))
    assert found["verdict"] == "suppressed"
    assert "demo:npo" in run("dissect", "models")
    assert "npo" in run("unlearn", "methods")
    # A built-in model that the wheel does not hold is trained where it is asked for.
    run("dissect", "behave", "--base", "demo:base", "--unlearned", "demo:rmu", "--limit", "4", "--out", "behaved")
