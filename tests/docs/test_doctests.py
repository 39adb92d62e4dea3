"""The examples in the docstrings of both packages give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import dissect
import unlearning

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    """Return the modules whose source has a doctest; nothing is imported to find them."""
    names = []
    for package in (dissect, unlearning):
        root = Path(package.__path__[0])
        found = pkgutil.walk_packages([str(root)], f"{package.__name__}.", onerror=lambda _name: None)
        for name in (package.__name__, *(module.name for module in found)):
            path = root.joinpath(*name.split(".")[1:])
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if ">>>" in source.read_text(encoding="utf-8"):
                names.append(name)
    return names


def own_examples(module: ModuleType) -> list[doctest.DocTest]:
    """Return the doctests of what a module defines itself."""
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in own_examples(module):
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
