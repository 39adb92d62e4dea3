"""The regular expressions in a saved adapter's configuration, by which peft would search without a limit on time."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from unlearning.common.errors import InputError
from unlearning.common.patterns import searcher

_ALL_LINEAR = "all-linear"
_REPEAT = re.compile(r"[*+?{]")


def limit_patterns(config: Any, model: nn.Module, file: Path) -> None:
    """Replace the expressions that choose modules by the modules' names, in place, and check the others.

    Args:
        config: Configuration of the adapter, as peft reads it.
        model: The base.
        file: File of the configuration, for messages.

    Raises:
        InputError: An expression is broken, takes for ever, matches no module, or repeats too much.
    """
    names = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules"):
        text = getattr(config, field, None)
        if not isinstance(text, str) or text.lower() == _ALL_LINEAR:
            continue
        try:
            matches = searcher(field, text, whole=True)
            found = {name for name in names if matches(name)}
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        if field == "target_modules" and not found:
            raise InputError(f"{file}: target_modules matches no module of the base, got {text[:80]!r}")
        setattr(config, field, found)
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        texts = getattr(config, field, None) or ()
        for text in [texts] if isinstance(texts, str) else texts:
            if isinstance(text, str) and _may_hang(text):
                raise InputError(f"{file}: {field} must hold names or simple expressions, got {text[:80]!r}")


def _may_hang(text: str) -> bool:
    """Return whether an expression repeats a group, or repeats more than twice."""
    return len(_REPEAT.findall(text)) > 2 or re.search(r"\)[*+?{]", text) is not None
