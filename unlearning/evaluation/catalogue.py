"""The benchmarks by name: their settings, and a list for users."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

from unlearning.common.errors import InputError, nearest
from unlearning.evaluation.settings import Settings

_BENCHMARKS = "unlearning.evaluation.benchmarks"

BENCHMARKS = {
    "tofu": ("tofu", "TofuSettings"),
    "muse": ("muse", "MuseSettings"),
    "mia": ("membership", "MembershipSettings"),
    "wmdp": ("multiple_choice", "WmdpSettings"),
    "choice": ("multiple_choice", "ChoiceSettings"),
    "quality": ("quality", "QualitySettings"),
    "familiarity": ("familiarity", "FamiliaritySettings"),
    "conceptvectors": ("conceptvectors", "ConceptVectorsSettings"),
    "lm-eval": ("lm_eval", "LmEvalSettings"),
}
"""Folder in `benchmarks/` and class of the settings of each benchmark; add a new benchmark here."""


def settings_type(benchmark: str) -> type[Settings]:
    """Find the settings class of a benchmark.

    Returns:
        The dataclass.

    Raises:
        InputError: There is no benchmark of this name.
    """
    if benchmark not in BENCHMARKS:
        hint = nearest(benchmark, BENCHMARKS) or ";"
        raise InputError(f"`benchmark` {benchmark!r} is unknown{hint} choose from {', '.join(BENCHMARKS)}")
    folder, name = BENCHMARKS[benchmark]
    found: type[Settings] = getattr(importlib.import_module(f"{_BENCHMARKS}.{folder}.settings"), name)
    return found


def settings_of(benchmark: str, options: dict[str, Any]) -> Settings:
    """Return the settings of a benchmark with the given options.

    Args:
        benchmark: Name of the benchmark.
        options: Values by the settings' names; others keep their defaults.

    Returns:
        The settings.

    Raises:
        InputError: There is no benchmark of this name, it has no such option, or an option that it needs is missing.
    """
    cls: Any = settings_type(benchmark)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in options:
        if name not in fields:
            hint = nearest(name, fields) or ";"
            raise InputError(f"{benchmark} has no option {name!r}{hint} choose from {', '.join(fields)}")
    missing = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and options.get(name) is None
    ]
    if missing:
        raise InputError(f"{benchmark} needs {', '.join(f'`{name}`' for name in missing)}.")
    settings: Settings = cls(**options)
    return settings


def list_benchmarks(name: str | None = None) -> list[dict[str, Any]]:
    """Return every benchmark, or the named one, as plain data.

    Args:
        name: Name of one benchmark; None for all.

    Returns:
        One dictionary per benchmark: `name`, `summary`, `source`, and `options`, a list of dictionaries with `name`,
        `default` (absent where the option must be given) and `help`.

    Raises:
        InputError: There is no benchmark of this name.

    Examples:
        >>> from unlearning import list_benchmarks
        >>> [benchmark["name"] for benchmark in list_benchmarks()][:4]
        ['tofu', 'muse', 'mia', 'wmdp']
        >>> list_benchmarks("muse")[0]["options"][0]["name"]
        'corpus'
    """
    return [_described(each) for each in (BENCHMARKS if name is None else [name])]


def _described(name: str) -> dict[str, Any]:
    cls: Any = settings_type(name)
    text = inspect.getdoc(cls) or ""
    helps = {field: " ".join(words.split()) for field, words in _ATTRIBUTE.findall(text.partition("Attributes:")[2])}
    options = []
    for field in dataclasses.fields(cls):
        default = {} if field.default is dataclasses.MISSING else {"default": field.default}
        options.append({"name": field.name, **default, "help": helps[field.name]})
    return {"name": name, "summary": text.splitlines()[0], "source": cls.source, "options": options}


_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*?)(?=^ {4}\w+:|\Z)", re.MULTILINE | re.DOTALL)
"""One attribute of a docstring: its name and its description."""
