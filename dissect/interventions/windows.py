"""Windows of layers: what a sweep goes through, and how a user names it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError

DEFAULT_WINDOWS: tuple[int | str, ...] = (5, 1, "suffix")
"""The paper's width, and beside it what tells an effect of the last layers from one of the last layer alone."""


@dataclass(frozen=True)
class Window:
    """Layers that are intervened on together.

    Attributes:
        centre: the layer that the window is named after; of a suffix its first one, of a prefix its last.
        layers: the layers, in order.
        kind: `5` (so many around the centre), `prefix`, `suffix`, `layers 3,7,12-15` or `all`.
    """

    centre: int
    layers: tuple[int, ...]
    kind: str = ""

    @property
    def first(self) -> int:
        """Its first layer."""
        return self.layers[0]

    @property
    def last(self) -> int:
        """Its last layer, inclusive."""
        return self.layers[-1]


def centred_windows(n_layers: int, width: int) -> list[Window]:
    """One window of `width` layers around every layer, clipped at the ends of the model.

    Raises:
        InputError: the width is even, not positive, or wider than the model.
    """
    check_width(width)
    if width > n_layers:
        widest = n_layers if n_layers % 2 else n_layers - 1
        raise InputError(f"--window {width}: the model has {n_layers} layers; use {widest} at most")
    half = width // 2
    return [
        Window(centre, tuple(range(max(0, centre - half), min(n_layers, centre + half + 1))), str(width))
        for centre in range(n_layers)
    ]


def check_width(width: int) -> None:
    """Check the width of a centred window.

    Raises:
        InputError: it is even or not positive.
    """
    if width < 1 or width % 2 == 0:
        raise InputError(f"--window {width}: a window has a centre, so its width must be odd, as 1, 3 or 5")


def prefix_windows(n_layers: int) -> list[Window]:
    """Layers 0..l for every l."""
    return [Window(last, tuple(range(last + 1)), "prefix") for last in range(n_layers)]


def suffix_windows(n_layers: int) -> list[Window]:
    """Layers l..last for every l."""
    return [Window(first, tuple(range(first, n_layers)), "suffix") for first in range(n_layers)]


def whole_model(n_layers: int) -> Window:
    """All layers at once, for what has no layer."""
    return Window(n_layers // 2, tuple(range(n_layers)), "all")


def parse_layers(text: str) -> tuple[int, ...]:
    """Read a list of layers, `3,7,12-15`.

    Raises:
        InputError: it is none.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise InputError(f"--layers {text}: {part.strip() or 'nothing'!r} is no layer; write 3,7,12-15")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def parse_windows(window: int | str | Sequence[int | str] | None, n_layers: int) -> list[Window]:
    """All windows of a sweep.

    Args:
        window: a width, `prefix`, `suffix`, `layers 3,7,12-15`, or several of these; None for the default kinds.
        n_layers: of the model.

    Raises:
        InputError: a word that is none of these, or layers that the model does not have.
    """
    if window is None:  # on a shallow model as wide as it allows
        widest = n_layers if n_layers % 2 else n_layers - 1
        window = [min(kind, widest) if isinstance(kind, int) else kind for kind in DEFAULT_WINDOWS]
    return [one for kind in window_kinds(window) for one in _windows_of(kind, n_layers)]


def window_kinds(window: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    """The kinds of windows that are named, each once, checked as far as that goes without a model.

    Raises:
        InputError: nothing is named, or a word that is no kind of window.
    """
    named: Iterable[int | str] = [window] if isinstance(window, int | str) else window
    kinds: list[int | str] = []
    for kind in named:
        if isinstance(kind, str) and kind.strip().lstrip("-").isdigit():
            kind = int(kind)
        if isinstance(kind, int):
            check_width(kind)
        elif kind.startswith("layers "):
            parse_layers(kind.removeprefix("layers "))
        elif kind not in ("prefix", "suffix"):
            raise InputError(f"--window {kind}: a window is an odd width, prefix, suffix, or layers 3,7,12-15")
        kinds.append(kind)
    if not kinds:
        raise InputError("--window: name at least one, as 5")
    return tuple(dict.fromkeys(kinds))


def _windows_of(kind: int | str, n_layers: int) -> list[Window]:
    if isinstance(kind, int):
        return centred_windows(n_layers, kind)
    if kind == "prefix":
        return prefix_windows(n_layers)
    if kind == "suffix":
        return suffix_windows(n_layers)
    text = kind.removeprefix("layers ")
    layers = parse_layers(text)
    if layers[-1] >= n_layers:
        raise InputError(f"--layers {text}: the model has layers 0 to {n_layers - 1}")
    return [Window(layers[len(layers) // 2], layers, f"layers {text}")]
