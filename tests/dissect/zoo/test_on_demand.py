"""A built-in model that the wheel does not hold is trained where it is first asked for."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dissect import zoo
from dissect.zoo import on_demand
from dissect.zoo.builder import build_family
from tests.dissect.zoo.test_build import MICRO
from unlearning.common.errors import InputError


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package directory with every model of the micro world."""
    home = tmp_path_factory.mktemp("package")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    build_family(MICRO, home / "models" / "demo", home / "questions", console=console, progress=False)
    torch.set_num_threads(threads)
    return home


@pytest.fixture
def package(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The micro world in the place of the shipped one."""
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(on_demand, "DIRECTORY", installed)
    monkeypatch.setattr(on_demand, "QUESTIONS", installed / "questions")
    monkeypatch.setattr(on_demand, "RECIPES", {"demo": MICRO})
    return installed


@pytest.mark.parametrize("method", ["npo", "whp"])
def test_the_model_is_the_one_that_the_builder_makes(
    package: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = on_demand.find_or_build("demo", method)
    shown = capsys.readouterr().err
    assert f"demo:{method}" in shown and str(path) in shown
    ours, theirs = (load_file(home / "model.safetensors") for home in (path, package / "models" / "demo" / method))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert on_demand.find_or_build("demo", method) == path
    assert capsys.readouterr().err == ""  # the second call finds it


def test_a_name_resolves_to_the_model_in_the_cache(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.BUILTIN, "demo:npo", package / "not there")
    assert (zoo.resolve("demo:npo") / "model.safetensors").is_file()


@pytest.mark.usefixtures("package")
def test_a_base_or_control_is_never_built_on_demand() -> None:
    with pytest.raises(InputError, match="demo:never.*dissect.zoo.build"):
        on_demand.find_or_build("demo", "never")


@pytest.mark.usefixtures("package")
def test_without_a_base_there_is_nothing_to_train_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_demand, "DIRECTORY", tmp_path)
    with pytest.raises(InputError, match="demo:npo.*dissect.zoo.build"):
        on_demand.find_or_build("demo", "npo")
