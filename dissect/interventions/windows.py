"""Define the windows of layers that a sweep goes through, and parse their names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError

DEFAULT_WINDOWS: tuple[int | str, ...] = (5, 1, "suffix")
"""Width in the Dissecting paper, single layers, and suffixes; the last two separate an effect of the last layer."""


_NUMBER = "[0-9]{1,9}"
"""A number in ASCII digits; Python refuses to convert thousands of digits, and to write such a number."""


@dataclass(frozen=True)
class Window:
    """Layers that are intervened on together.

    Attributes:
        centre: Layer that the window is named after: the first layer of a suffix, the last layer of a prefix.
        layers: Layers in ascending order.
        kind: A width such as `5`, `prefix`, `suffix`, `layers 3,7,12-15` or `all`.
    """

    centre: int
    layers: tuple[int, ...]
    kind: str = ""

    @property
    def first(self) -> int:
        """First layer of the window."""
        return self.layers[0]

    @property
    def last(self) -> int:
        """Last layer of the window, inclusive."""
        return self.layers[-1]


def centred_windows(n_layers: int, width: int) -> list[Window]:
    """Return one window of layers around every layer, clipped at the ends of the model.

    Args:
        n_layers: Number of layers of the model.
        width: Number of layers in a window; odd.

    Returns:
        The windows, in the order of their centres.

    Raises:
        InputError: The width is even, not positive, or larger than the number of layers.
    """
    check_width(width)
    if width > n_layers:
        widest = n_layers if n_layers % 2 else n_layers - 1
        raise InputError(f"`window` must be at most {widest} for a model with {n_layers} layers, got {width}")
    half = width // 2
    return [
        Window(centre, tuple(range(max(0, centre - half), min(n_layers, centre + half + 1))), str(width))
        for centre in range(n_layers)
    ]


def check_width(width: int) -> None:
    """Check the width of a centred window.

    Raises:
        InputError: The width is even or not positive.
    """
    if width.bit_length() > 32:
        raise InputError("`window` must be an odd width such as 1, 3 or 5, got a number of more than 9 digits")
    if width < 1 or width % 2 == 0:
        raise InputError(f"`window` must be an odd width such as 1, 3 or 5, got {width}")


def prefix_windows(n_layers: int) -> list[Window]:
    """Return the windows of layers 0..l for every l."""
    return [Window(last, tuple(range(last + 1)), "prefix") for last in range(n_layers)]


def suffix_windows(n_layers: int) -> list[Window]:
    """Return the windows of layers l..last for every l."""
    return [Window(first, tuple(range(first, n_layers)), "suffix") for first in range(n_layers)]


def whole_model(n_layers: int) -> Window:
    """Return one window of all layers, for weights that belong to no layer."""
    return Window(n_layers // 2, tuple(range(n_layers)), "all")


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Parse a list of layers.

    Args:
        text: Layers and ranges of layers, such as `3,7,12-15`.
        n_layers: Number of layers of the model.

    Returns:
        The layers in ascending order, each once.

    Raises:
        InputError: The text is not a list of layers, or the model does not have them.
    """
    ranges = _layer_ranges(text)
    if max(last for _, last in ranges) >= n_layers:
        raise InputError(f"`layers` must be between 0 and {n_layers - 1} for this model, got {text!r}")
    return tuple(sorted({layer for first, last in ranges for layer in range(first, last + 1)}))


def _layer_ranges(text: str) -> set[tuple[int, int]]:
    """Return the first and the last layer of each part of a list of layers."""
    ranges = set()
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:-\s*({_NUMBER})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise InputError(
                f"`layers` must be a list such as 3,7,12-15, got {text!r}: {part.strip()!r} is not a layer"
            )
        ranges.add((int(match[1]), int(match[2] or match[1])))
    return ranges


def parse_windows(window: int | str | Sequence[int | str] | None, n_layers: int) -> list[Window]:
    """Return all windows of a sweep.

    Args:
        window: A width, `prefix`, `suffix`, `layers 3,7,12-15`, or several of these; None for the default kinds.
        n_layers: Number of layers of the model.

    Returns:
        The windows, kind by kind.

    Raises:
        InputError: A kind is unknown, or the model does not have the layers.
    """
    if window is None:  # a shallow model limits the default width
        widest = n_layers if n_layers % 2 else n_layers - 1
        window = [min(kind, widest) if isinstance(kind, int) else kind for kind in DEFAULT_WINDOWS]
    return [one for kind in window_kinds(window) for one in _windows_of(kind, n_layers)]


def window_kinds(window: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    """Parse the kinds of windows, without a model.

    Args:
        window: A width, `prefix`, `suffix`, `layers 3,7,12-15`, or several of these.

    Returns:
        The kinds in their order, each once; widths are numbers.

    Raises:
        InputError: No kind is given, or a kind is unknown.
    """
    named: Iterable[int | str] = [window] if isinstance(window, int | str) else window
    kinds: list[int | str] = []
    for kind in named:
        if isinstance(kind, str) and re.fullmatch(rf"\s*-?{_NUMBER}\s*", kind):
            kind = int(kind)
        if isinstance(kind, int):
            check_width(kind)
        elif kind.startswith("layers "):
            _layer_ranges(kind.removeprefix("layers "))
        elif kind not in ("prefix", "suffix"):
            raise InputError(f"`window` must be an odd width, prefix, suffix, or layers 3,7,12-15, got {kind!r}")
        kinds.append(kind)
    if not kinds:
        raise InputError("`window` must name at least one kind of window such as 5, got none")
    return tuple(dict.fromkeys(kinds))


def _windows_of(kind: int | str, n_layers: int) -> list[Window]:
    if isinstance(kind, int):
        return centred_windows(n_layers, kind)
    if kind == "prefix":
        return prefix_windows(n_layers)
    if kind == "suffix":
        return suffix_windows(n_layers)
    text = kind.removeprefix("layers ")
    layers = parse_layers(text, n_layers)
    return [Window(layers[len(layers) // 2], layers, f"layers {text}")]
