"""The one exception for input that a person can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command lines print it without a traceback and exit with 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something is near, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
