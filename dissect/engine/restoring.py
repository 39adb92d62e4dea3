"""Models and blocks that compute with some of another model's weights: pointers, no copies."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from dissect.weights import Chosen, row_dim


def restored_values(target: nn.Module, base: nn.Module, chosen: Chosen) -> dict[str, Tensor]:
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


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The same tree of modules with other values under some of its parameters' names.

    Every other parameter and buffer is shared with the module, which stays as it is. A parameter that is tied to
    another one is set under the given name alone.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    tree = copy.deepcopy(module, memo=dict(shared))
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        tree.get_submodule(path)._parameters[key] = nn.Parameter(value, requires_grad=False)
    return tree
