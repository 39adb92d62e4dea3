"""Interventions as plain data: what to do to which layers, never how it is run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dissect.sites import SiteSet, site_label
from unlearning.errors import InputError


@dataclass(frozen=True)
class Window:
    """Neighbouring layers that are intervened on together.

    Attributes:
        centre: the layer that the window is named after.
        first: its first layer.
        last: its last layer, inclusive.
    """

    centre: int
    first: int
    last: int

    @property
    def layers(self) -> range:
        """The layers of the window."""
        return range(self.first, self.last + 1)

    def is_clipped(self, width: int) -> bool:
        """Whether the end of the model cut it short of `width` layers."""
        return len(self.layers) < width


@dataclass(frozen=True)
class Intervention:
    """One run of the target model with something replaced.

    Attributes:
        kind: `patch` replaces activations by the base's, at every token position; `restore` replaces weights.
        sites: what is replaced, all of it in the same window: names of `SITES` or of `WEIGHT_SITES`.
        window: in which layers.
    """

    kind: Literal["patch", "restore"]
    sites: SiteSet
    window: Window

    def sites_at(self, layer: int) -> frozenset[str]:
        """What is replaced in one layer."""
        return frozenset(self.sites) if layer in self.window.layers else frozenset()

    @property
    def label(self) -> str:
        """`mlp_coef+attn_out @ 3..7`."""
        return f"{site_label(self.sites)} @ {self.window.first}..{self.window.last}"


def centred_windows(n_layers: int, width: int) -> list[Window]:
    """One window of `width` layers around every layer, clipped at the ends of the model.

    Raises:
        InputError: the width is even, not positive, or wider than the model.
    """
    if width < 1 or width % 2 == 0:
        raise InputError(f"--window {width}: a window has a centre, so its width must be odd, as 1, 3 or 5")
    if width > n_layers:
        widest = n_layers if n_layers % 2 else n_layers - 1
        raise InputError(f"--window {width}: the model has {n_layers} layers; use {widest} at most")
    half = width // 2
    return [
        Window(centre=centre, first=max(0, centre - half), last=min(n_layers - 1, centre + half))
        for centre in range(n_layers)
    ]


def sweep(
    sites: Iterable[SiteSet], windows: Iterable[Window], *, kind: Literal["patch", "restore"] = "patch"
) -> list[Intervention]:
    """Every set of sites in every window: the layer sweep of the Dissecting paper."""
    windows = list(windows)
    return [Intervention(kind, site_set, window) for site_set in sites for window in windows]
