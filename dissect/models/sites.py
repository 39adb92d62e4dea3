"""Name the sites of a model that can be intervened on, and parse their names.

An activation site has the name of a TransformerLens hook point. It is the input or output of a part of a block, and
TransformerLens' architecture adapters know the Hugging Face module of that part, so no table of architectures is kept
here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from unlearning.common.errors import InputError, nearest


@dataclass(frozen=True)
class Site:
    """An activation in every block that can be replaced.

    Attributes:
        name: Name that users write.
        hook: TransformerLens hook point, with `{layer}` for the index of the layer.
        width: Width of the activation's last dimension.
        part: Module of the activation, a field of `dissect.models.anatomy.Block`.
        meaning: One line for help texts.
        is_input: True if the activation is that module's input, False if it is the output.
    """

    name: str
    hook: str
    width: Literal["d_model", "d_mlp"]
    part: Literal["attn_out", "mlp_out", "down_proj", "whole", "attn", "mlp", "q_proj", "o_proj"]
    meaning: str
    is_input: bool = False

    def hook_name(self, layer: int) -> str:
        """Return the hook point of this site in one layer."""
        return self.hook.format(layer=layer)


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site(
            "mlp_coef",
            "blocks.{layer}.mlp.out.hook_in",
            "d_mlp",
            "down_proj",
            "MLP coefficients: input of the down projection",
            is_input=True,
        ),
        Site(
            "attn_out",
            "blocks.{layer}.attn.hook_out",
            "d_model",
            "attn_out",
            "output of the attention output projection",
        ),
        Site(
            "mlp_out",
            "blocks.{layer}.mlp.hook_out",
            "d_model",
            "mlp_out",
            "output of the MLP, before any norm after it",
        ),
        Site("resid_post", "blocks.{layer}.hook_out", "d_model", "whole", "residual stream after the block"),
    )
}


@dataclass(frozen=True)
class WeightSite:
    """Weights of a model that can be restored to the base's.

    Attributes:
        name: Name that users write.
        meaning: One line for help texts.
        unchanged: Activations of a block that do not depend on these weights, given the block's input.
    """

    name: str
    meaning: str
    unchanged: frozenset[Literal["attn_out", "mlp_coef"]] = frozenset()


WEIGHT_SITES: dict[str, WeightSite] = {
    site.name: site
    for site in (
        WeightSite(
            "value_vectors",
            "value vectors: weights of the down projection, of all experts",
            frozenset({"attn_out", "mlp_coef"}),
        ),
        WeightSite(
            "key_vectors",
            "key vectors: weights of the up and gate projections, of all experts",
            frozenset({"attn_out"}),
        ),
        WeightSite(
            "router",
            "router of a mixture of experts, and what weighs its shared experts",
            frozenset({"attn_out"}),
        ),
        WeightSite("W_gate", "gate projection alone", frozenset({"attn_out"})),
        WeightSite("W_in", "up projection alone", frozenset({"attn_out"})),
        WeightSite("attn_weights", "weights of the attention: queries, keys, values and output"),
        WeightSite("W_Q", "query projection alone"),
        WeightSite("W_K", "key projection alone"),
        WeightSite("W_V", "value projection alone"),
        WeightSite("W_O", "attention output projection alone"),
        WeightSite("norms", "norms of the layers; norms after the blocks belong to the last layer"),
        WeightSite("embed", "embeddings of tokens and positions, and what projects or normalises them"),
        WeightSite("unembed", "output head, and what projects to its width"),
    )
}

SiteSet = tuple[str, ...]
"""Sites that are replaced together: weights first, in the order of their tables. Users join their names by `+`."""

PATCH_SITES: tuple[SiteSet, ...] = (("mlp_coef",), ("attn_out",), ("mlp_coef", "attn_out"))
"""The three activation sweeps of the Dissecting paper (2410.06606, section 3)."""
RESTORE_SITES: tuple[SiteSet, ...] = (("value_vectors",),)
"""The weight sweep of the Dissecting paper."""


def is_regex(site: str) -> bool:
    """Return True if a site is a regular expression over parameters' names, written `/REGEX/`."""
    return len(site) > 2 and site.startswith("/") and site.endswith("/")


def regex_of(site: str) -> str:
    """Return the regular expression between the slashes."""
    return site[1:-1]


def is_weight(site: str) -> bool:
    """Return True if a site is a weight site, False if it is an activation site."""
    return site in WEIGHT_SITES or is_regex(site)


def leaves_unchanged(sites: Iterable[str], activation: Literal["attn_out", "mlp_coef"]) -> bool:
    """Return True if restoring weights does not change an activation of their block, given the block's input.

    Args:
        sites: Weight sites that are restored.
        activation: Activation of the same block.

    Returns:
        False also for regular expressions, whose parameters are unknown here.
    """
    return all(site in WEIGHT_SITES and activation in WEIGHT_SITES[site].unchanged for site in sites)


def site_label(sites: SiteSet) -> str:
    """Return the name of a set of sites in tables and figures, such as `mlp_coef+attn_out`."""
    return "+".join(sites)


def parse_site_set(text: str, *, weights: bool = False) -> SiteSet:
    """Parse one set of sites.

    Args:
        text: Names joined by `+`, such as `mlp_coef` or `value_vectors+mlp_coef`.
        weights: True to allow weight sites; then at least one of the sites must be one.

    Returns:
        The sites, in the order of their tables.

    Raises:
        InputError: A name is unknown or occurs twice, a weight site is not allowed, or a weight site is missing.
    """
    names = [name.strip() for name in text.split("+")]
    known = {**WEIGHT_SITES, **SITES} if weights else SITES
    for name in names:
        if name in WEIGHT_SITES and not weights:
            raise InputError(f"`sites` must be activations for a patch, got the weights {name}; use dissect restore")
        if name not in known:
            raise InputError(f"`sites` must be among {', '.join(known)}, got {name!r}{nearest(name, known)}")
    if len(set(names)) < len(names):
        raise InputError(f"`sites` must name each site once in a set, got {text!r}")
    if weights and not any(is_weight(name) for name in names):
        raise InputError(
            f"`sites` must include weights to restore, got {text!r}; add some such as value_vectors+{names[0]}, or use "
            "dissect patch"
        )
    return tuple(name for name in known if name in names)


def parse_sites(texts: str | Sequence[str], *, weights: bool = False) -> tuple[SiteSet, ...]:
    """Parse sets of sites.

    Args:
        texts: A comma-separated list of sets, or a sequence of sets; see `parse_site_set`.
        weights: True to allow weight sites; then at least one site of every set must be one.

    Returns:
        The sets in their order, each once.

    Raises:
        InputError: No set is given, or a set is wrong; see `parse_site_set`.
    """
    parts = texts.split(",") if isinstance(texts, str) else list(texts)
    parsed = [parse_site_set(part, weights=weights) for part in parts if part.strip()]
    if not parsed:
        known = WEIGHT_SITES if weights else SITES
        raise InputError(f"`sites` must name at least one of {', '.join(known)}, got none")
    return tuple(dict.fromkeys(parsed))
