"""Find the parameters of a mixture of experts in a block: value vectors, key vectors and the router.

No family's names are trusted. Experts are stacked matrices that read or write the residual stream, or MLPs in a list of
modules; the router is what has one output for each of them.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from unlearning.checkpoints.sizes import CHOSEN_EXPERTS


@dataclass(frozen=True)
class FeedForward:
    """What a block has beside its attention and norms.

    Attributes:
        counts: Numbers of experts; empty in a dense block.
        stacked: True if experts are tensors with one more dimension, not modules.
        sites: For every parameter, and every persistent buffer of the router, its weight site: `value_vectors`,
            `key_vectors` or `router`. What structure does not tell the site of is left out.
    """

    counts: frozenset[int]
    stacked: bool
    sites: Mapping[str, str]


def down_projection(module: nn.Module, d_model: int) -> str | None:
    """Return the child of an MLP that is its down projection, by the shapes of its projections.

    It reads what all the others write; a fused gate and up projection writes twice as much. Children without matrices,
    such as norms, do not count.

    Args:
        module: The MLP.
        d_model: Width of the residual stream.

    Returns:
        The child's name; None if the module is no MLP, or if its shapes do not tell.
    """
    shapes = {}
    for name, child in module.named_children():
        if any(parameter.dim() > 1 for parameter in child.parameters()):
            if not isinstance(child, nn.Linear | Conv1D):
                return None
            matrix = child.weight if isinstance(child, nn.Linear) else child.weight.T
            shapes[name] = (matrix.shape[1], matrix.shape[0])

    def fits(name: str) -> bool:
        (read, wrote), others = shapes[name], [shape for other, shape in shapes.items() if other != name]
        widths = {(wrote, read), (wrote, 2 * read)} if len(others) == 1 else {(wrote, read)}
        return wrote == d_model and bool(others) and widths.issuperset(others)

    found = [name for name in shapes if fits(name)]
    return found[0] if len(found) == 1 else None


def feed_forward(block: nn.Module, attn: str | None, d_model: int) -> FeedForward:
    """Sort the parameters of a block's feed-forward part; their values need not be in memory.

    Args:
        block: The block.
        attn: Dotted path of its attention, which is left out.
        d_model: Width of the residual stream.

    Returns:
        The parameters by site.
    """
    parameters = {
        name: parameter
        for name, parameter in block.named_parameters(remove_duplicate=False)
        if not is_below(name, attn)
    }
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if parameter.dim() == 3 and len(parameter) > 1 and d_model in parameter.shape[1:]
    }
    sites: dict[str, str] = {}
    down = _stacked_down_projection(shapes, d_model)
    if down is not None:
        for name, parameter in parameters.items():
            matrix = next((matrix for matrix in shapes if name.startswith(matrix)), None)  # of a bias too
            if matrix is not None and len(parameter) == shapes[matrix][0]:
                sites[name] = "value_vectors" if matrix == down else "key_vectors"
    mlps = {
        path: last
        for path, module in block.named_modules()
        if path and path != attn and not is_below(path, attn)
        if (last := down_projection(module, d_model)) is not None
    }
    for path, last in mlps.items():
        for child, module in block.get_submodule(path).named_children():
            if any(parameter.dim() > 1 for parameter in module.parameters()):
                site = "value_vectors" if child == last else "key_vectors"
                sites |= {f"{path}.{child}.{key}": site for key, _ in module.named_parameters()}
    counts = frozenset([*(shape[0] for shape in shapes.values()), *_lists(block, mlps).values()])
    if counts:
        sites |= _router(block, parameters, sites, counts, d_model, attn)
        # A vector beside the experts that is as wide as the residual stream is added to what they wrote.
        sites |= {
            name: "value_vectors"
            for name, parameter in parameters.items()
            if name not in sites and tuple(parameter.shape) == (d_model,)
            if any(is_below(one, name.rpartition(".")[0]) for one in sites if sites[one] == "value_vectors")
        }
    return FeedForward(counts, bool(shapes), sites)


def shares_of_experts(block: nn.Module, config: Any, d_model: int) -> dict[str, float]:
    """Return which share of every expert's parameters one token goes through, all experts together.

    Args:
        block: A block; its weights need not be in memory.
        config: The model's configuration, asked where no router says how many experts it chooses.
        d_model: Width of the residual stream.

    Returns:
        The share by name of parameter, in the attention too; what every token goes through is left out.
    """
    chosen = {n for module in block.modules() if isinstance(n := getattr(module, "top_k", None), int)}
    named = {n for name in CHOSEN_EXPERTS if isinstance(n := getattr(config, name, None), int)}
    active = max(chosen or named, default=None)
    counts = {
        name: len(parameter)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3 and len(parameter) > 1 and d_model in parameter.shape[1:]
        if _is_told_where(block.get_submodule(name.rpartition(".")[0]))
    }
    mlps = [path for path, module in block.named_modules() if path and down_projection(module, d_model) is not None]
    for path, n_experts in _lists(block, mlps).items():
        counts |= {name: n_experts for name, _ in block.named_parameters() if is_below(name, path)}
    return {name: min(1.0, (active or n_experts) / n_experts) for name, n_experts in counts.items()}


def _is_told_where(experts: nn.Module) -> bool:
    """Return True if stacked experts are told which token each is to read; those of Llama 4 all read every token."""
    return len(inspect.signature(experts.forward).parameters) > 1


def _stacked_down_projection(shapes: Mapping[str, tuple[int, ...]], d_model: int) -> str | None:
    """Return the down projection among the stacked matrices of all experts, however they are transposed."""
    inner = {name: rows * columns // d_model for name, (_, rows, columns) in shapes.items()}
    if len(shapes) == 2:  # gate and up are one matrix, twice as wide
        narrow, wide = sorted(inner, key=lambda name: inner[name])
        return narrow if 2 * inner[narrow] == inner[wide] else None
    alone = [name for name, shape in shapes.items() if list(shapes.values()).count(shape) == 1]
    return alone[0] if len(shapes) == 3 and len(alone) == 1 and len(set(inner.values())) == 1 else None


def _lists(block: nn.Module, mlps: Iterable[str]) -> dict[str, int]:
    """Return the length of every list of MLPs."""
    return {
        path: len(module)
        for path, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
        if all(f"{path}.{name}" in mlps for name, _ in module.named_children())
    }


def _router(
    block: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    experts: Iterable[str],
    counts: frozenset[int],
    d_model: int,
    attn: str | None,
) -> dict[str, str]:
    """Return the router's parameters and persistent buffers; nothing if there is not exactly one router.

    It is the largest module without experts around the matrix with one output for each expert. What has one number for
    each expert, and what weighs a shared expert by a single number, belongs to it wherever it stands.
    """
    widths = [sorted((count, d_model)) for count in counts]
    free = {name: parameter for name, parameter in parameters.items() if name not in experts}
    matrices = [name for name, parameter in free.items() if parameter.dim() == 2 and sorted(parameter.shape) in widths]
    if len(matrices) != 1:
        return {}
    others = [*experts, *([f"{attn}."] if attn else [])]
    path: str | None = None
    above = matrices[0].rpartition(".")[0]
    while above and not any(is_below(name, above) for name in others):
        path, above = above, above.rpartition(".")[0]
    kept = block.state_dict()
    buffers = {name: buffer for name, buffer in block.named_buffers() if name in kept and not is_below(name, attn)}

    def belongs(name: str, shape: list[int]) -> bool:
        per_expert = shape[-1:] != [d_model] and math.prod(shape) in counts and math.prod(shape) == shape[-1]
        return name == matrices[0] or is_below(name, path) or per_expert or shape == [1, d_model]

    return {name: "router" for name, tensor in {**free, **buffers}.items() if belongs(name, sorted(tensor.shape))}


def is_below(name: str, path: str | None) -> bool:
    """Return True if a dotted name belongs to the module at a path."""
    return path is not None and name.startswith(f"{path}.")
