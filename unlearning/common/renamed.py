"""Old names of keyword arguments, accepted for one version."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def renamed_arguments(**renamed: str) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Make a decorator with which a function accepts the old names of some of its keyword arguments.

    Args:
        **renamed: The new name of each argument, by its old name.

    Returns:
        A decorator. The decorated function warns with one DeprecationWarning when it is called with old names.

    Raises:
        TypeError: The decorated function is called with both the old and the new name of an argument.

    Examples:
        >>> @renamed_arguments(facts="limit")
        ... def ask(limit=4):
        ...     return limit
        >>> ask(limit=8)
        8
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Returned:
            old_names = [old for old in renamed if old in kwargs]
            for old in old_names:
                new = renamed[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both `{new}` and its old name `{old}`; give `{new}`")
                kwargs[new] = kwargs.pop(old)
            if old_names:
                names = ", ".join(f"`{old}` (now `{renamed[old]}`)" for old in old_names)
                message = f"{function.__name__}(): renamed arguments: {names}; the next version drops the old names"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return call

    return decorate
