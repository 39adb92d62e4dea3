"""Models and blocks that compute with some of another model's weights: pointers, no copies."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from dissect.models.anatomy import Block, parts_of
from dissect.models.model import Model
from dissect.models.weights import Location, ParameterRows, row_dim

Tree = TypeVar("Tree", bound=nn.Module)


def restored_values(target: nn.Module, base: nn.Module, chosen: ParameterRows) -> dict[str, Tensor]:
    """The values that the chosen parameters of a target get: the base's own, or a mixture where only rows are chosen.

    Args:
        target: a model, or a part of one.
        base: the same of the base.
        chosen: names of parameters from these modules, with the output rows that are meant.
    """
    values = {}
    for name, rows in chosen.items():
        ours, theirs = target.get_parameter(name).data, base.get_parameter(name).data
        if rows is None:
            values[name] = theirs if theirs.device == ours.device else theirs.to(ours.device)
            continue
        dim = 0 if ours.dim() == 1 else row_dim(target.get_submodule(name.rpartition(".")[0]))
        here = rows.to(ours.device)
        values[name] = ours.index_copy(dim, here, theirs.to(ours.device).index_select(dim, here))
    return values


def with_values(module: Tree, values: Mapping[str, Tensor]) -> Tree:
    """The same tree of modules with other values under some of its parameters' names.

    Every other parameter and buffer is shared with the module, which stays as it is, and so is every submodule that
    holds none of the changed ones. A parameter that is tied to another one is set under the given name alone.
    """
    paths = [name.split(".") for name in values]
    changed = {id(module.get_submodule(".".join(path[:depth]))) for path in paths for depth in range(len(path))}
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        if id(part) not in changed and part is not module:
            shared[id(part)] = part
        if hasattr(part, "config"):
            shared[id(part.config)] = part.config
    tree = copy.deepcopy(module, memo=shared)
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        tree.get_submodule(path)._parameters[key] = nn.Parameter(value, requires_grad=False)
    return tree


def restored_block(ours: Block, theirs: Block, sites: frozenset[str], layer: int, model: Model) -> Block:
    """A block that computes with the weights of another one at these sites.

    Args:
        ours: the target's block.
        theirs: the donor's.
        sites: the weights.
        layer: which layer they are.
        model: the target.
    """
    prefix = f"{model.anatomy.blocks}.{layer}."
    chosen = {name.removeprefix(prefix): rows for name, rows in model.weights.at(sites, layer).items()}
    return parts_of(with_values(ours.whole, restored_values(ours.whole, theirs.whole, chosen)), model.anatomy)


def restored_model(target: Model, donor: Model, sites: frozenset[str], place: Location) -> PreTrainedModel:
    """A target's Hugging Face model with the donor's weights at these sites and this place."""
    return with_values(target.hf, restored_values(target.hf, donor.hf, target.weights.at(sites, place)))
