"""The exception for input that the user can correct, and how its messages name arguments.

A message names an argument in backticks, as Python spells it: "`batch_size` must be at least 1, got 0". The command
lines show the flag instead ("--batch-size must be at least 1, got 0"): `with_flags` replaces the names, in one place.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class InputError(ValueError):
    """Wrong input. The message is one line that says what is wrong and what to do.

    The command lines print it without a traceback and exit with 2.
    """


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Check that a number is not below a minimum.

    Args:
        name: Name of the argument, as Python spells it.
        value: What the user gave.
        minimum: Smallest value that is allowed.

    Raises:
        InputError: The value is below the minimum.
    """
    if value < minimum:
        raise InputError(f"`{name}` must be at least {minimum}, got {value}")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put an argument before the message of an InputError that names no argument, such as one about a file.

    Args:
        name: Name of the argument, as Python spells it.

    Yields:
        Nothing.

    Raises:
        InputError: The block raises one.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith("`") else f"`{name}`: {message}") from None


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace every argument in backticks by its flag.

    Args:
        message: A message that names arguments in backticks, or what switches them off, such as
            `vectors=False` and `concepts=()`.
        flags: Flag of each argument; an argument without one keeps its name and loses its backticks.

    Returns:
        The message as the command line shows it.
    """
    return re.sub(r"`([A-Za-z_]\w*(?:=False|=\(\))?)`", lambda found: flags.get(found[1], found[1]), message)


_LONGEST_MESSAGE = 1500
_QUOTED = re.compile(r"""(?<!\w)(['"])((?:\\.|(?!\1).)*)\1(?!\w)""", re.DOTALL)
"""A quotation, also a short one, so that what stands between two is none."""

_LONGEST_QUOTED = 120
_UNBROKEN = re.compile(r"\S{251,}")


def shortened(message: str) -> str:
    """Shorten what a message repeats of a user's argument or file, which may have a million characters.

    Args:
        message: The message.

    Returns:
        The message with quotations of more than 120 characters, and of more than 250 without a space (as some paths
        have), cut in the middle to 100.

    Examples:
        >>> shortened(f"`sites` must be sites, got {'x' * 1000!r}; leave it out") == (
        ...     f"`sites` must be sites, got {'x' * 67 + '...' + 'x' * 30!r}; leave it out"
        ... )
        True
        >>> shortened(f"'a' {'is long, ' * 20}'b'") == f"'a' {'is long, ' * 20}'b'"
        True
    """
    if len(message) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]}...{message[-half:]}"
    message = _QUOTED.sub(
        lambda found: found[0] if len(found[2]) <= _LONGEST_QUOTED else f"{found[1]}{_middle_cut(found[2])}{found[1]}",
        message,
    )
    return _UNBROKEN.sub(lambda found: _middle_cut(found[0]), message)


def _middle_cut(text: str) -> str:
    return f"{text[:67]}...{text[-30:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if a known name is similar, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
