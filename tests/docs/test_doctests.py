"""The examples in the docstrings of both packages give what they say."""

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


SHARED = ("load_pair", "load_model", "load_prompts", "patch", "restore", "decompose", "probe", "behave", "verdict")
"""Public functions that many examples call alike. What they return is handed out as it is: results give copies."""


def remembered(function: Callable[..., Any], found: dict[Any, tuple[Any, Any]]) -> Callable[..., Any]:
    """Return a function that computes once for the same arguments, in the same process."""

    def call(*arguments: Any, **options: Any) -> Any:
        simple = (str, int, float, bool, type(None), Path, list, tuple)
        given = [*arguments, *(value for pair in sorted(options.items()) for value in pair)]
        key = (function.__name__, *(repr(value) if isinstance(value, simple) else id(value) for value in given))
        if "out" in options:  # the example looks at what is written
            return function(*arguments, **options)
        if key not in found:
            found[key] = (function(*arguments, **options), given)  # kept alive, so that no id is used twice
        return found[key][0]

    return call


@pytest.fixture(scope="module")
def found() -> dict[Any, tuple[Any, Any]]:
    return {}


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_hold(
    name: str, found: dict[Any, tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    for shared in SHARED:
        monkeypatch.setattr(dissect, shared, remembered(getattr(dissect, shared), found), raising=False)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in own_examples(module):
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
