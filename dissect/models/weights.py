"""Find the parameters of a weight site, by their Hugging Face names.

No table of architectures is kept here: modules are found through TransformerLens' adapters. The rows of a fused
projection that belong to queries, keys or values are found by applying the adapter's own split to row numbers instead
of weights.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.models.anatomy import Anatomy, component_path
from dissect.models.experts import FeedForward, feed_forward, is_below
from dissect.models.outside_blocks import find_uses
from dissect.models.sites import is_regex, regex_of
from unlearning.common.patterns import searcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Int[Tensor, " rows"]
ParameterRows = Mapping[str, Rows | None]
"""Names of parameters, each with its output rows, or None for all rows."""
Location = int | Literal["before", "after"]
"""Index of a layer, `before` the first block, or `after` the last one."""

_OFFSET = 2**32
"""Offset between the row numbers of two projections, larger than any number of rows."""
_FUSED = {"W_Q": ("attn", 0), "W_K": ("attn", 1), "W_V": ("attn", 2), "W_gate": ("mlp", 0), "W_in": ("mlp", 1)}
_OF_MIXTURE = ("value_vectors", "key_vectors", "router")
"""Sites of the feed-forward part of a mixture of experts."""
_OWN = {"W_Q": ("attn", "q"), "W_K": ("attn", "k"), "W_V": ("attn", "v"), "W_O": ("attn", "o")} | {
    "W_gate": ("mlp", "gate"),
    "W_in": ("mlp", "in"),
}


@dataclass(frozen=True, eq=False)
class WeightNames:
    """Parameters of a model by weight site.

    Attributes:
        blocks: Dotted path of the list of blocks.
        n_layers: Number of blocks.
        in_block: For each layer and site, names of parameters from the block, with their rows.
        before: Names of parameters used before the first block: embeddings, and what projects or normalises them.
        final_norm: Names of parameters of norms after the last block.
        head: Names of other parameters used after the last block: the output head, and what projects to its width.
        all_names: Names of all parameters, tied ones under both names, and of persistent buffers of routers.
        refused: Sites that this architecture cannot have, activations too, each with the reason.
        problem: The reason why the model's forward cannot be taken apart at its blocks, or "".
    """

    blocks: str
    n_layers: int
    in_block: Sequence[Mapping[str, ParameterRows]]
    before: tuple[str, ...]
    final_norm: tuple[str, ...]
    head: tuple[str, ...]
    all_names: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def at(self, sites: Iterable[str], location: Location) -> dict[str, Rows | None]:
        """Return the parameters of weight sites at one location.

        Args:
            sites: Weight sites.
            location: A layer, `before` the first block or `after` the last one.

        Returns:
            Names from the model's root, each with its output rows, or None for all rows.
        """
        found: dict[str, Rows | None] = {}
        for site in sites:
            for name, rows in self._parameters(site, location).items():
                known = found.get(name, rows)
                found[name] = None if rows is None or known is None else torch.cat([known, rows]).unique()
        return found

    def _parameters(self, site: str, location: Location) -> ParameterRows:
        if is_regex(site):
            matches = searcher("parameters", regex_of(site))
            return dict.fromkeys(name for name in self.all_names if self._location(name) == location and matches(name))
        if isinstance(location, int):
            here = self.in_block[location].get(site, {})
            return {f"{self.blocks}.{location}.{name}": rows for name, rows in here.items()}
        if location == "before":
            return dict.fromkeys(self.before if site == "embed" else ())
        return dict.fromkeys({"unembed": self.head, "norms": self.final_norm}.get(site, ()))

    def _location(self, name: str) -> Location:
        if name.startswith(f"{self.blocks}."):
            return int(name.removeprefix(f"{self.blocks}.").partition(".")[0])
        return "after" if name in self.final_norm or name in self.head else "before"


def find_weights(hf: "PreTrainedModel", anatomy: Anatomy, adapter: Any) -> WeightNames:
    """Find a model's parameters by weight site; weights need not be in memory.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of the model.
        adapter: TransformerLens' adapter of the architecture.

    Returns:
        The parameters by site.
    """
    names = tuple(name for name, _ in hf.named_parameters(remove_duplicate=False))
    outside = [name for name in names if not name.startswith(f"{anatomy.blocks}.")]
    uses = find_uses(hf, anatomy, outside)
    after = [name for name in outside if name in uses.after]
    blocks: Any = hf.get_submodule(anatomy.blocks)
    in_block, refused = _sites_in_blocks(hf, blocks, anatomy, adapter)
    for site in ("W_Q", "W_K", "W_V"):
        if not any(site in sites for sites in in_block):
            refused[site] = (
                f"the attention of {type(hf).__name__} has no projection of its own for it; use attn_weights"
            )
    return WeightNames(
        blocks=anatomy.blocks,
        n_layers=len(blocks),
        in_block=in_block,
        before=tuple(name for name in outside if name not in after),  # those that nothing uses too
        final_norm=tuple(name for name in after if not _in_projection(hf, name)),
        head=tuple(name for name in after if _in_projection(hf, name)),
        all_names=(*names, *_buffers_of_routers(blocks, anatomy.blocks, in_block)),
        refused=refused | uses.refused,
        problem=uses.problem,
    )


def _buffers_of_routers(blocks: nn.ModuleList, path: str, in_block: Sequence[Mapping[str, ParameterRows]]) -> list[str]:
    return [
        f"{path}.{layer}.{name}"
        for layer, (block, sites) in enumerate(zip(blocks, in_block, strict=True))
        for name in sites.get("router", {})
        if name in dict(block.named_buffers())
    ]


def _in_projection(module: nn.Module, name: str) -> bool:
    """Return True if a parameter belongs to a projection: a module with a matrix, whose bias belongs to it too.

    Norms and scales have vectors only.
    """
    return any(parameter.dim() > 1 for parameter in _owner(module, name).parameters(recurse=False))


def _sites_in_blocks(
    hf: "PreTrainedModel", blocks: nn.ModuleList, anatomy: Anatomy, adapter: Any
) -> tuple[list[dict[str, ParameterRows]], dict[str, str]]:
    """Return the parameters by site of every block, and the sites that the blocks cannot have with the reason.

    Blocks of the same form are taken apart once.
    """
    d_model, kind = int(adapter.cfg.d_model), type(hf).__name__
    known: dict[object, tuple[dict[str, ParameterRows], FeedForward]] = {}
    forms = []
    for block in blocks:
        shapes = ((name, tuple(parameter.shape)) for name, parameter in block.named_parameters(remove_duplicate=False))
        form = (type(block), *shapes)
        forms.append(form)
        if form not in known:
            known[form] = _sites_in_block(block, anatomy, adapter), feed_forward(block, anatomy.attn, d_model)
    found = [dict(known[form][0]) for form in forms]
    parts = [known[form][1] for form in forms]
    if not any(part.counts for part in parts):
        missing = f"the MLPs of {kind} have no down projection that could be found"
        sites = ("mlp_coef", "value_vectors", "key_vectors", "W_gate", "W_in")
        refused = {} if anatomy.down_proj else dict.fromkeys(sites, missing)
        if anatomy.down_proj and not any("W_in" in sites for sites in found):
            refused["W_in"] = f"the up projection of {kind} cannot be told from its other projections"
        return [{site: rows for site, rows in sites.items() if site not in refused} for sites in found], refused
    refused = _refused_of_mixture(kind, parts, has_mlp_out=anatomy.mlp is not None)
    for layer, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        unknown = _sort_mixture(found[layer], block, part)
        if unknown and "router" not in refused:
            reason = f"structure does not tell what {anatomy.blocks}.{layer}.{unknown[0]} is in this mixture of experts"
            refused |= dict.fromkeys(_OF_MIXTURE, f"{reason}; restore it by name with --parameters")
    return [{site: rows for site, rows in sites.items() if site not in refused} for sites in found], refused


def _refused_of_mixture(kind: str, parts: Sequence[FeedForward], *, has_mlp_out: bool) -> dict[str, str]:
    """Return the sites that a model with experts cannot have, each with the reason."""
    some = "the blocks" if all(part.counts for part in parts) else "some blocks"
    what = f"{some} of {kind} are mixtures of experts"
    fused = f"{what}, whose gate and up projections are not told apart; use key_vectors"
    if any(part.stacked for part in parts):
        reason = "their experts are stacked tensors, so no module reads the coefficients"
    else:
        reason = "each expert reads the coefficients of its own tokens only"
    beside = f"{what} that stand beside an MLP and are added to it; patch resid_post"
    instead = "patch mlp_out, or restore" if has_mlp_out else "restore"
    return ({} if has_mlp_out else {"mlp_out": beside}) | {
        "mlp_coef": f"{what}: {reason}; {instead} value_vectors, key_vectors or router",
        "W_gate": fused,
        "W_in": fused,
    }


def _sort_mixture(sites: dict[str, ParameterRows], block: nn.Module, part: FeedForward) -> list[str]:
    """Put the feed-forward part of a block of a mixture into its sites; return the parameters without a site."""
    sites["norms"] = {name: rows for name, rows in sites["norms"].items() if name not in part.sites}
    sites |= {site: dict.fromkeys(name for name, of in part.sites.items() if of == site) for site in _OF_MIXTURE}
    placed = {*part.sites, *sites["norms"], *sites["attn_weights"]}
    return [name for name, _ in block.named_parameters(remove_duplicate=False) if name not in placed]


def _sites_in_block(block: nn.Module, anatomy: Anatomy, adapter: Any) -> dict[str, ParameterRows]:
    names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    projections = {name for name in names if _in_projection(block, name)}
    # A vector of a module that has other modules is no norm, such as the sinks of an attention.
    vectors = [name for name in names if name not in projections]
    loose = {name for name in vectors if "." in name and list(_owner(block, name).children())}
    attn = {name for name in (*projections, *loose) if is_below(name, anatomy.attn)}
    sites: dict[str, ParameterRows] = {
        "attn_weights": dict.fromkeys(name for name in names if name in attn),
        "norms": dict.fromkeys(name for name in vectors if name not in loose),
    }
    if anatomy.down_proj is not None:
        values = {name for name in projections if is_below(name, anatomy.down_proj)}
        of_mlp = {name for name in projections | loose if anatomy.mlp is None or is_below(name, anatomy.mlp)}
        sites["value_vectors"] = dict.fromkeys(name for name in names if name in values)
        sites["key_vectors"] = dict.fromkeys(name for name in names if name in of_mlp - attn - values)
    mapping = adapter.component_mapping["blocks"]
    for site, (part, key) in _OWN.items():
        path = component_path(mapping.submodules, part, key)
        own = [name for name in projections if is_below(name, path)]
        if own:
            sites[site] = dict.fromkeys(own)
    for part, split_name in (("attn", "split_qkv_matrix"), ("mlp", "split_gate_up_matrix")):
        component = mapping.submodules.get(part)
        path = None if component is None else component.name
        split = getattr(component, split_name, None)
        if split is None or path is None or path not in {name for name, _ in block.named_modules()}:
            continue
        for site, chosen in _fused(block.get_submodule(path), path, split, part).items():
            sites.setdefault(site, chosen)
    return sites


def _owner(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.rpartition(".")[0])


def _fused(module: nn.Module, path: str, split: Callable[[nn.Module], Any], part: str) -> dict[str, ParameterRows]:
    """Return the rows of a fused projection by site; empty if the adapter cannot split this module."""
    fused = [(name, child) for name, child in module.named_modules() if _is_matrix(child)]
    numbered = copy.deepcopy(module, memo={id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for number, (name, child) in enumerate(fused):
        _number_rows(numbered.get_submodule(name), child, first=number * _OFFSET)
    try:
        pieces = split(numbered)
    except (AttributeError, AssertionError, ValueError, RuntimeError, TypeError):
        return {}
    found: dict[str, ParameterRows] = {}
    sites = [site for site, (of_part, _) in _FUSED.items() if of_part == part]
    for site, piece in zip(sites, pieces, strict=True):
        numbers = piece.weight.detach().unique().long()
        name, child = fused[int(numbers[0]) // _OFFSET]
        own = [key for key, parameter in child.named_parameters(recurse=False) if parameter is not None]
        found[site] = dict.fromkeys((".".join(filter(None, (path, name, key))) for key in own), numbers % _OFFSET)
    return found


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _number_rows(module: nn.Module, like: nn.Module, *, first: int) -> None:
    """Set every weight and bias to the number of its output row."""
    n_rows = like.get_parameter("weight").shape[row_dim(like)]
    rows = torch.arange(first, first + n_rows, dtype=torch.float64)
    across = rows if row_dim(like) == 1 else rows[:, None]
    for name, parameter in like.named_parameters(recurse=False):
        numbers = rows if parameter.dim() == 1 else across.expand(parameter.shape).contiguous()
        module._parameters[name] = nn.Parameter(numbers, requires_grad=False)


def row_dim(module: nn.Module) -> int:
    """Return the dimension of a projection's matrix along which its outputs are."""
    return 1 if isinstance(module, Conv1D) else 0
