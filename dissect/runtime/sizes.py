"""Write and parse sizes in bytes."""

import math

from unlearning.common.errors import InputError


def in_bytes(number: int, *, up: bool = False) -> str:
    """Return a size as text, such as `1.5 GB`.

    Args:
        number: Number of bytes.
        up: Round up instead of to the nearest, for a size that must suffice.

    Returns:
        The text, with at most one decimal.
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            tenths = math.ceil(10 * number / size) if up else round(10 * number / size)
            return f"{tenths / 10:g} {unit}"
    return f"{number} bytes"


def parse_bytes(text: str) -> int:
    """Parse a size.

    Args:
        text: Such as `10MB`, `6GiB`, `1.5 GB`, or a number of bytes.

    Returns:
        The number of bytes.

    Raises:
        InputError: The text is not a size, or the size is not positive.
    """
    units = {"": 1, "B": 1}
    units |= {f"{letter}{suffix}": 1000**n for n, letter in enumerate("KMGT", 1) for suffix in ("", "B")}
    units |= {f"{letter}{suffix}": 1024**n for n, letter in enumerate("KMGT", 1) for suffix in ("I", "IB")}
    compact = "".join(text.split()).upper()
    digits = compact.rstrip("KMGTIB")
    try:
        number = int(float(digits) * units[compact[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        number = 0
    if number <= 0:
        raise InputError(f"`max_memory` must be a size such as 6GiB, 800MB or a number of bytes, got {text!r}")
    return number
