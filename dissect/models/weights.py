"""Find the parameters of a weight site, by their Hugging Face names.

No table of architectures is kept here: modules are found through TransformerLens' adapters. The rows of a fused
projection that belong to queries, keys or values are found by applying the adapter's own split to row numbers instead
of weights.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.models.anatomy import Anatomy, component_path
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
        in_block: For each site, names of parameters from the block, with their rows.
        before: Names of parameters used before the first block: embeddings and what follows them.
        final_norm: Names of parameters used between the last block and the head.
        head: Names of parameters of the output head.
        all_names: Names of all parameters; tied ones under both names.
    """

    blocks: str
    n_layers: int
    in_block: Mapping[str, ParameterRows]
    before: tuple[str, ...]
    final_norm: tuple[str, ...]
    head: tuple[str, ...]
    all_names: tuple[str, ...]

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
            return {f"{self.blocks}.{location}.{name}": rows for name, rows in self.in_block.get(site, {}).items()}
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
    blocks = f"{anatomy.blocks}."
    head = _below(hf, hf.get_output_embeddings(), names)
    final_norm = tuple(name for name in names if _is_below(name, component_path(adapter.component_mapping, "ln_final")))
    outside = tuple(name for name in names if not name.startswith(blocks))
    return WeightNames(
        blocks=anatomy.blocks,
        n_layers=len(hf.get_submodule(anatomy.blocks)),  # type: ignore[arg-type]
        in_block=_sites_in_block(hf.get_submodule(anatomy.blocks)[0], anatomy, adapter),  # type: ignore[index]
        before=tuple(name for name in outside if name not in (*final_norm, *head)),
        final_norm=final_norm,
        head=head,
        all_names=names,
    )


def _below(hf: nn.Module, module: nn.Module | None, names: Iterable[str]) -> tuple[str, ...]:
    paths = [path for path, found in hf.named_modules(remove_duplicate=False) if found is module]
    return tuple(name for name in names if any(_is_below(name, path) for path in paths))


def _is_below(name: str, path: str | None) -> bool:
    return path is not None and name.startswith(f"{path}.")


def _sites_in_block(block: nn.Module, anatomy: Anatomy, adapter: Any) -> dict[str, ParameterRows]:
    names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    # A module with a matrix is a projection, and its bias belongs to it. Norms and scales have vectors only.
    projections = {name for name in names if any(p.dim() > 1 for p in _owner(block, name).parameters(recurse=False))}
    attn = {name for name in projections if _is_below(name, anatomy.attn)}
    sites: dict[str, ParameterRows] = {
        "attn_weights": dict.fromkeys(attn),
        "norms": dict.fromkeys(name for name in names if name not in projections),
    }
    if anatomy.down_proj is not None:
        values = {name for name in projections if _is_below(name, anatomy.down_proj)}
        sites["value_vectors"] = dict.fromkeys(values)
        sites["key_vectors"] = dict.fromkeys(name for name in projections if name not in attn | values)
    mapping = adapter.component_mapping["blocks"]
    for site, (part, key) in _OWN.items():
        path = component_path(mapping.submodules, part, key)
        own = [name for name in projections if _is_below(name, path)]
        if part == "mlp" and anatomy.down_proj is None:  # in a mixture of experts, `gate` is the router
            continue
        if own:
            sites[site] = dict.fromkeys(own)
    for part, split_name in (("attn", "split_qkv_matrix"), ("mlp", "split_gate_up_matrix")):
        component = mapping.submodules.get(part)
        path = None if component is None else component.name
        split = getattr(component, split_name, None)
        if split is None or path is None:
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
    except (AttributeError, AssertionError, ValueError, RuntimeError):
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
