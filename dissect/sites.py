"""The vocabulary of places in a block where a model can be intervened on.

A site is named by the field's term and resolved to a TransformerLens hook point; TransformerLens' architecture
adapters know which Hugging Face module that is, so no table of architectures is kept here.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unlearning.errors import InputError


@dataclass(frozen=True)
class Site:
    """One place in every block whose activation can be replaced.

    Attributes:
        name: the word that users write.
        hook: TransformerLens hook point, with `{layer}` to be filled in.
        width: which of the model's widths the activation's last dimension has.
        part: the module that it belongs to, a field of `dissect.anatomy.Anatomy`.
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
    """One weight of every block that can be restored to the base's.

    Attributes:
        name: the word that users write.
        part: the module that holds it, a field of `dissect.anatomy.Block`.
        meaning: one line for help texts.
    """

    name: str
    part: Literal["down_proj"]
    meaning: str


WEIGHT_SITES: dict[str, WeightSite] = {
    site.name: site
    for site in (WeightSite("value_vectors", "down_proj", "value vectors: weights of the down projection"),)
}

SiteSet = tuple[str, ...]
"""Sites that are patched together, in the order of `SITES`; written joined by `+`."""

DEFAULT_SITES: tuple[SiteSet, ...] = (("mlp_coef",), ("attn_out",), ("mlp_coef", "attn_out"))
"""The three activation sweeps of the Dissecting paper (2410.06606, section 3)."""


def site_label(sites: SiteSet) -> str:
    """How a set of sites is written in tables and figures: `mlp_coef+attn_out`."""
    return "+".join(sites)


def parse_site_set(text: str) -> SiteSet:
    """Read one set of sites, `mlp_coef` or `mlp_coef+attn_out`.

    Raises:
        InputError: a name is unknown (with the nearest known one) or stands there twice.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in SITES:
            near = difflib.get_close_matches(name, SITES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"unknown site {name!r}: {hint}known sites are {', '.join(SITES)}")
    if len(set(names)) < len(names):
        raise InputError(f"{text!r} names a site twice")
    return tuple(name for name in SITES if name in names)


def parse_sites(texts: str | Sequence[str]) -> tuple[SiteSet, ...]:
    """Read a comma-separated list of sets of sites, or a sequence of them; duplicates are dropped.

    Raises:
        InputError: nothing is named, or a name is unknown.
    """
    parts = texts.split(",") if isinstance(texts, str) else list(texts)
    parsed = [parse_site_set(part) for part in parts if part.strip()]
    if not parsed:
        raise InputError(f"no site is named; known sites are {', '.join(SITES)}")
    return tuple(dict.fromkeys(parsed))
