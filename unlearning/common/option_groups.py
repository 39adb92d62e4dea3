"""Commands that take a group of options as one dataclass, for both command lines."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def expand_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Declare one option per field of each parameter that is a dataclass.

    Args:
        function: A command whose options are keyword arguments, single or grouped in a dataclass.

    Returns:
        A function with one keyword argument per option, from which typer declares the command line.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    declared = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            declared += _declare_fields(groups[parameter.name])
        else:
            declared.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        grouped = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        function(**values, **grouped)

    command.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in declared}
    return command


def _declare_fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
