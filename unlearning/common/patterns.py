"""Regular expressions that users give: compiled and searched within limits, since some take for ever."""

import re
import time
from collections.abc import Callable

import regex

from unlearning.common.errors import InputError

LIMIT_S = 1.0
"""Longest time for one name, in seconds; a sound expression takes microseconds."""

TOTAL_S = 5.0
"""Longest time for all names together, in seconds."""

LENGTH = 4000
"""Maximum length of an expression, in characters."""

UNROLLED = 10_000
"""Maximum length of an expression whose repeats, such as + and {9}, are written out."""

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\(\?#[^)]*\)?|\(|\)|"
    r"(?P<count>\{(?P<least>[0-9]*),?(?P<most>[0-9]*)\})|.",
    re.DOTALL,
)
_EXTENSION = re.compile(r"\?(?:[:=!>(]|<[=!]|P[<=]|[aimsuL]*(?:-[ims]+)?[:)])")
"""What may follow an opening bracket and a question mark: what Python's own expressions have, without verbose ones."""


def searcher(argument: str, text: str, *, whole: bool = False, length: int | None = LENGTH) -> Callable[[str], bool]:
    r"""Return a function that says whether a name matches a regular expression.

    Args:
        argument: Name of the argument, as Python spells it, for messages.
        text: The expression.
        whole: It must match the whole name, not only a part.
        length: Maximum length in characters; None for an expression that lists names, which no user typed.

    Returns:
        The function; it raises InputError if the expression takes too long or too much memory.

    Raises:
        InputError: The expression is broken, too long, repeats something too often, or has what Python's have not,
            such as calls of its own parts.

    Examples:
        >>> matches = searcher("parameters", r"mlp\.(up|gate)_proj")
        >>> matches("model.layers.0.mlp.up_proj.weight"), matches("lm_head.weight")
        (True, False)
    """
    shown = repr(text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}")
    if reason := _excess(text, length):
        raise InputError(f"`{argument}` must be a regular expression, got {shown}: {reason}")
    try:
        compiled = regex.compile(text)
    except (regex.error, RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"`{argument}` must be a regular expression, got {shown}: {_reason(error)}") from None
    match = compiled.fullmatch if whole else compiled.search

    left = TOTAL_S

    def matches(name: str) -> bool:
        nonlocal left
        started, limit = time.monotonic(), min(LIMIT_S, left)
        try:
            return match(name, timeout=limit) is not None
        except TimeoutError:
            names = repr(name) if limit == LIMIT_S else f"the names up to {name!r}"
            raise InputError(
                f"`{argument}` must be a regular expression that ends, got {shown}, which takes more than "
                f"{LIMIT_S if limit == LIMIT_S else TOTAL_S:g} s on {names}. Repeat nothing that is repeated itself, "
                "as in (a+)+."
            ) from None
        except (regex.error, RecursionError, ValueError, OverflowError, MemoryError) as error:
            raise InputError(
                f"`{argument}` must be a regular expression that ends, got {shown}, which fails on {name!r}: "
                f"{_reason(error)}"
            ) from None
        finally:
            left = max(left - (time.monotonic() - started), 1e-3)

    return matches


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return " ".join(str(error).split()) or type(error).__name__


def _excess(text: str, length: int | None) -> str | None:
    """Return what makes an expression too large to be compiled or matched; None if nothing does."""
    if length is not None and len(text) > length:
        return f"it has {len(text)} characters, and at most {length} are allowed"
    sizes, last = [0], 0  # length of the open groups, written out, from the outermost; and of what a count repeats
    for token in _TOKEN.finditer(text):
        if token[0] == "(":
            if text.startswith("?", token.end()) and not _EXTENSION.match(text, token.end()):
                return f"{text[token.start() : token.end() + 3]} is nothing that Python's regular expressions have"
            sizes.append(0)
        elif token[0] == ")":
            last = sizes.pop()
            sizes = [*sizes[:-1], sizes[-1] + last] if sizes else [last]
        elif token["count"] or token[0] == "+":  # compiled as a+ and a{2,} are: aa* and aaa*
            times = 1 + max(int(digits[:9]) if digits else 1 for digits in (token["least"], token["most"]))
            sizes[-1] += last * (times - 1)
            last *= times
            if sizes[-1] > UNROLLED:
                return f"with its repeats written out it is longer than {UNROLLED} characters"
        elif token[0] not in ("*", "?", "|") and not token[0].startswith("(?#"):
            last = 1
            sizes[-1] += 1
    return None
