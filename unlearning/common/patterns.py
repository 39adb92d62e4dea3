"""Regular expressions that users give: searched in names with a limit on time, since some take for ever."""

from collections.abc import Callable

import regex

from unlearning.common.errors import InputError

LIMIT_S = 1.0
"""Longest time for one name, in seconds; a sound expression takes microseconds."""


def searcher(argument: str, text: str, *, whole: bool = False) -> Callable[[str], bool]:
    r"""Return a function that says whether a name matches a regular expression.

    Args:
        argument: Name of the argument, as Python spells it, for messages.
        text: The expression.
        whole: It must match the whole name, not only a part.

    Returns:
        The function; it raises InputError if the expression takes too long.

    Raises:
        InputError: The expression is broken.

    Examples:
        >>> matches = searcher("parameters", r"mlp\.(up|gate)_proj")
        >>> matches("model.layers.0.mlp.up_proj.weight"), matches("lm_head.weight")
        (True, False)
    """
    try:
        compiled = regex.compile(text)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"`{argument}` must be a regular expression, got {text!r}: {error}") from None
    match = compiled.fullmatch if whole else compiled.search

    def matches(name: str) -> bool:
        try:
            return match(name, timeout=LIMIT_S) is not None
        except TimeoutError:
            raise InputError(
                f"`{argument}` must be a regular expression that ends, got {text!r}, which takes more than {LIMIT_S:g} "
                f"s on {name!r}. Repeat nothing that is repeated itself, as in (a+)+."
            ) from None

    return matches
