"""The vocabulary of places in a block where a model can be intervened on.

A site is named by the field's term and resolved to a TransformerLens hook point; TransformerLens' architecture
adapters know which Hugging Face module that is, so no table of architectures is kept here.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from unlearning.common.errors import InputError


@dataclass(frozen=True)
class Site:
    """One place in every block whose activation can be replaced.

    Attributes:
        name: the word that users write.
        hook: TransformerLens hook point, with `{layer}` to be filled in.
        width: which of the model's widths the activation's last dimension has.
        part: the module that it belongs to, a field of `dissect.models.anatomy.Anatomy`.
        meaning: one line for help texts.
    """

    name: str
    hook: str
    width: Literal["d_model", "d_mlp"]
    part: Literal["attn", "mlp", "down_proj", "blocks"]
    meaning: str

    def hook_name(self, layer: int) -> str:
        """The hook point of this site in one layer."""
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
        ),
        Site(
            "attn_out", "blocks.{layer}.attn.hook_out", "d_model", "attn", "output of the attention output projection"
        ),
        Site("mlp_out", "blocks.{layer}.mlp.hook_out", "d_model", "mlp", "output of the MLP, before any norm after it"),
        Site("resid_post", "blocks.{layer}.hook_out", "d_model", "blocks", "residual stream after the block"),
    )
}


@dataclass(frozen=True)
class WeightSite:
    """Weights of a model that can be restored to the base's.

    Attributes:
        name: the word that users write.
        meaning: one line for help texts.
        unchanged: which of a block's activations are the same with and without it, given what enters the block.
    """

    name: str
    meaning: str
    unchanged: frozenset[Literal["attn_out", "mlp_coef"]] = frozenset()


WEIGHT_SITES: dict[str, WeightSite] = {
    site.name: site
    for site in (
        WeightSite(
            "value_vectors", "value vectors: weights of the down projection", frozenset({"attn_out", "mlp_coef"})
        ),
        WeightSite("key_vectors", "key vectors: weights of the up and gate projections", frozenset({"attn_out"})),
        WeightSite("W_gate", "gate projection alone", frozenset({"attn_out"})),
        WeightSite("W_in", "up projection alone", frozenset({"attn_out"})),
        WeightSite("attn_weights", "weights of the attention: queries, keys, values and output"),
        WeightSite("W_Q", "query projection alone"),
        WeightSite("W_K", "key projection alone"),
        WeightSite("W_V", "value projection alone"),
        WeightSite("W_O", "attention output projection alone"),
        WeightSite("norms", "norms of the layers; the final one counts to the last layer"),
        WeightSite("embed", "embeddings, of positions too"),
        WeightSite("unembed", "output head"),
    )
}

SiteSet = tuple[str, ...]
"""Sites that are replaced together, weights first, in the order of their tables; written joined by `+`."""

PATCH_SITES: tuple[SiteSet, ...] = (("mlp_coef",), ("attn_out",), ("mlp_coef", "attn_out"))
"""The three activation sweeps of the Dissecting paper (2410.06606, section 3)."""
RESTORE_SITES: tuple[SiteSet, ...] = (("value_vectors",),)
"""Its sweep of weights."""


def is_regex(site: str) -> bool:
    """Whether a site is a regular expression over parameters' names, written `/REGEX/`."""
    return len(site) > 2 and site.startswith("/") and site.endswith("/")


def regex_of(site: str) -> str:
    """The expression between the slashes."""
    return site[1:-1]


def is_weight(site: str) -> bool:
    """Whether a site is one of weights, and not of activations."""
    return site in WEIGHT_SITES or is_regex(site)


def leaves_unchanged(sites: Iterable[str], activation: Literal["attn_out", "mlp_coef"]) -> bool:
    """Whether restoring these weights leaves an activation of their block as it is, given what enters the block."""
    return all(site in WEIGHT_SITES and activation in WEIGHT_SITES[site].unchanged for site in sites)


def site_label(sites: SiteSet) -> str:
    """How a set of sites is written in tables and figures: `mlp_coef+attn_out`."""
    return "+".join(sites)


def parse_site_set(text: str, *, weights: bool = False) -> SiteSet:
    """Read one set of sites, `mlp_coef` or `value_vectors+mlp_coef`.

    Args:
        text: the names, joined by `+`.
        weights: whether weights may be among them; then at least one has to be.

    Raises:
        InputError: a name is unknown (with the nearest known one) or stands there twice, or weights where there
            should be none, or none where there should be one.
    """
    names = [name.strip() for name in text.split("+")]
    known = {**WEIGHT_SITES, **SITES} if weights else SITES
    for name in names:
        if name in WEIGHT_SITES and not weights:
            raise InputError(f"{name} is a weight, and a patch replaces activations; use dissect restore")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"unknown site {name!r}: {hint}known sites are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise InputError(f"{text!r} names a site twice")
    if weights and not any(is_weight(name) for name in names):
        raise InputError(f"{text!r} restores no weight; add one, as value_vectors+{names[0]}, or use dissect patch")
    return tuple(name for name in known if name in names)


def parse_sites(texts: str | Sequence[str], *, weights: bool = False) -> tuple[SiteSet, ...]:
    """Read a comma-separated list of sets of sites, or a sequence of them; duplicates are dropped.

    Raises:
        InputError: nothing is named, or what `parse_site_set` raises.
    """
    parts = texts.split(",") if isinstance(texts, str) else list(texts)
    parsed = [parse_site_set(part, weights=weights) for part in parts if part.strip()]
    if not parsed:
        raise InputError(f"no site is named; known sites are {', '.join({**WEIGHT_SITES} if weights else SITES)}")
    return tuple(dict.fromkeys(parsed))
