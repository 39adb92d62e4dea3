"""Interventions as plain data: what to do to which layers, never how it is run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dissect.interventions.windows import Window, whole_model
from dissect.models.sites import SITES, SiteSet, is_weight, site_label
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.weights import WeightNames

NO_SITES: frozenset[str] = frozenset()
OUTSIDE = frozenset({"embed", "unembed"})
"""Sites that no block has."""


@dataclass(frozen=True)
class Intervention:
    """One run of the target model with something replaced.

    Attributes:
        sites: what is replaced, all of it in the same window: names of `SITES`, of `WEIGHT_SITES`, or `/REGEX/`.
        window: in which layers.
        before: those of the sites whose weights outside the blocks count too, as embeddings.
        after: the same of what follows the last block, as the final norm and the head.
    """

    sites: SiteSet
    window: Window
    before: frozenset[str] = field(default=NO_SITES)
    after: frozenset[str] = field(default=NO_SITES)

    @property
    def kind(self) -> Literal["patch", "restore"]:
        """`patch` replaces activations by the donor's, at every token position; `restore` replaces weights too."""
        return "restore" if any(is_weight(site) for site in self.sites) else "patch"

    def sites_at(self, layer: int) -> frozenset[str]:
        """What is replaced in the block of one layer."""
        return frozenset(self.sites) - OUTSIDE if layer in self.window.layers else NO_SITES

    @property
    def label(self) -> str:
        """`mlp_coef+attn_out @ 3..7`."""
        return f"{site_label(self.sites)} @ {self.window.first}..{self.window.last}"


def weights_among(sites: Iterable[str]) -> frozenset[str]:
    """Those of the sites that are weights."""
    return frozenset(site for site in sites if is_weight(site))


def sweep(
    site_sets: Iterable[SiteSet], windows: Iterable[Window], weights: "WeightNames | None" = None
) -> list[Intervention]:
    """Every set of sites in every window: the layer sweep of the Dissecting paper.

    A window in which a set has nothing to replace is left out. A set that has something outside the blocks only, as
    `embed`, is done once, and its window is called `all`.

    Args:
        site_sets: what is replaced together.
        windows: where.
        weights: which weights the model has; needed where a weight is among the sites.

    Raises:
        InputError: none of the windows has anything of a set.
    """
    windows = list(windows)
    planned: list[Intervention] = []
    for sites in site_sets:
        several = _in_windows(sites, windows, weights)
        if not several:
            raise InputError(
                f"{site_label(sites)}: has nothing in the layers that are named; name others, or a --window"
            )
        planned += several
    return planned


def _in_windows(sites: SiteSet, windows: list[Window], weights: "WeightNames | None") -> list[Intervention]:
    named = weights_among(sites)
    if not named:
        return [Intervention(sites, window) for window in windows]
    assert weights is not None, "restoring weights needs their names"
    before = frozenset(site for site in named if weights.at([site], "before"))
    after = frozenset(site for site in named if weights.at([site], "after"))
    inside = frozenset(layer for layer in range(weights.n_layers) if weights.at(named, layer))
    if not inside and not any(site in SITES for site in sites):
        return [Intervention(sites, whole_model(weights.n_layers), before, after)]
    last = weights.n_layers - 1
    return [
        # Norms go by layer, and the final one stands behind the last.
        Intervention(sites, window, before, after if last in window.layers else after - {"norms"})
        for window in windows
        if inside & set(window.layers) or any(site in SITES for site in sites)
    ]
