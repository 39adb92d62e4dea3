"""Sizes in bytes, as people write them."""

import math

from unlearning.common.errors import InputError


def in_bytes(number: int, *, up: bool = False) -> str:
    """`1.5 GB`; rounded up where it is to be enough."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            tenths = math.ceil(10 * number / size) if up else round(10 * number / size)
            return f"{tenths / 10:g} {unit}"
    return f"{number} bytes"


def parse_bytes(text: str) -> int:
    """Read `10MB`, `6GiB`, `1.5 GB` or a plain number of bytes.

    Raises:
        InputError: it is none of these, or not positive.
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
        raise InputError(f"--max-memory {text}: give a size as 6GiB, 800MB or a number of bytes")
    return number
