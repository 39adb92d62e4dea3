"""Describe interventions as plain data: which sites are replaced in which layers, not how an engine does it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dissect.interventions.windows import Window, whole_model
from dissect.models.sites import SITES, SiteSet, is_weight, site_label
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.weights import WeightNames

NO_SITES: frozenset[str] = frozenset()
OUTSIDE_BLOCKS = frozenset({"embed", "unembed"})
"""Sites outside the blocks."""


@dataclass(frozen=True)
class Intervention:
    """One run of the target model with some of its sites replaced.

    Attributes:
        sites: Sites that are replaced, all in the same window: names of `SITES`, of `WEIGHT_SITES`, or `/REGEX/`.
        window: Layers in which the sites are replaced.
        before: Weight sites that are also restored before the first block, such as `embed`.
        after: Weight sites that are also restored after the last block, such as `norms` (final norm) and `unembed`.
    """

    sites: SiteSet
    window: Window
    before: frozenset[str] = field(default=NO_SITES)
    after: frozenset[str] = field(default=NO_SITES)

    @property
    def kind(self) -> Literal["patch", "restore"]:
        """`patch` if only activations are replaced, at every token position; `restore` if weights are replaced."""
        return "restore" if any(is_weight(site) for site in self.sites) else "patch"

    def sites_at(self, layer: int) -> frozenset[str]:
        """Return the sites that are replaced in the block of one layer."""
        return frozenset(self.sites) - OUTSIDE_BLOCKS if layer in self.window.layers else NO_SITES

    @property
    def label(self) -> str:
        """Sites and layers, such as `mlp_coef+attn_out @ 3..7`."""
        return f"{site_label(self.sites)} @ {self.window.first}..{self.window.last}"


def weights_among(sites: Iterable[str]) -> frozenset[str]:
    """Return the weight sites among sites."""
    return frozenset(site for site in sites if is_weight(site))


def sweep(
    site_sets: Iterable[SiteSet], windows: Iterable[Window], weights: "WeightNames | None" = None
) -> list[Intervention]:
    """Return an intervention for every set of sites in every window: the layer sweep of the Dissecting paper.

    A window in which a set has no weights and no activations is left out. A set with weights outside the blocks only,
    such as `embed`, gives one intervention, whose window is called `all`.

    Args:
        site_sets: Sets of sites; each set is replaced together.
        windows: Windows of layers.
        weights: Parameters of the model by site; needed if weight sites are named.

    Returns:
        The interventions, in the order of the sets and then of the windows.

    Raises:
        InputError: A set has nothing to replace in any window.
    """
    windows = list(windows)
    planned: list[Intervention] = []
    for sites in site_sets:
        interventions = _in_windows(sites, windows, weights)
        if not interventions:
            raise InputError(
                f"`window` must include layers that have {site_label(sites)}, got layers without it; name other layers"
            )
        planned += interventions
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
        # `norms` is restored layer by layer; the final norm belongs to the last layer.
        Intervention(sites, window, before, after if last in window.layers else after - {"norms"})
        for window in windows
        if inside & set(window.layers) or any(site in SITES for site in sites)
    ]
