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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if a known name is similar, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
