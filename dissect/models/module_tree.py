"""Copy a tree of modules with other values for some of its parameters, without copies of tensors."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Tree = TypeVar("Tree", bound=nn.Module)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter or buffer by its dotted name."""
    path, _, key = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), key)
    return found.data


def with_values(module: Tree, values: Mapping[str, Tensor]) -> Tree:
    """Return a copy of a module tree with other values for some of its parameters or buffers.

    All other parameters and buffers, and every submodule without a changed parameter, are shared with the module, which
    is not changed. A tied parameter is changed under the given name only.

    Args:
        module: Root of the tree.
        values: New values by dotted names.

    Returns:
        The root of the copy.
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
        owner = tree.get_submodule(path)
        if key in owner._buffers:
            owner._buffers[key] = value
        else:
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)
    return tree
