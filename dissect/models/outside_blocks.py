"""Find out what a model uses each parameter outside its blocks for: before the blocks, after them, or both.

No names are trusted. The model's own forward is run on a few tokens with its blocks left out, and autograd's record of
it says which parameters the states that enter the blocks depend on, and which the logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dissect.models.anatomy import Anatomy
from dissect.models.module_tree import with_values
from dissect.models.taken_apart import logits_of, recorded_inputs
from dissect.runtime.memory import is_out_of_memory
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_N_TOKENS = 4
_ROWS_READ = 64
"""Rows that are kept of a tensor whose values are not in memory: more than any token or position that is read."""


@dataclass(frozen=True)
class Uses:
    """Where a model uses its parameters outside the blocks.

    Attributes:
        after: Names of parameters that are used after the last block; all others are used before the first one, or
            nowhere.
        refused: Weight sites that cannot be restored in this architecture, each with the reason.
        problem: The reason why the model's forward cannot be taken apart at its blocks, or "".
    """

    after: frozenset[str]
    refused: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def find_uses(hf: "PreTrainedModel", anatomy: Anatomy, names: Sequence[str]) -> Uses:
    """Find out where a model uses its parameters outside the blocks; their values need not be in memory.

    Args:
        hf: Hugging Face model; it is not changed.
        anatomy: Module paths of its blocks.
        names: Names of the parameters outside the blocks; tied ones under both names.

    Returns:
        The uses.
    """
    with torch.inference_mode(False), torch.enable_grad():
        tree, leaves = _with_leaves(hf, names)
        device = next((leaf.device for leaf in leaves.values()), torch.device("cpu"))
        ids = torch.arange(_N_TOKENS, device=device)[None] % hf.config.get_text_config().vocab_size
        try:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            hidden, arguments, as_tuple = recorded_inputs(tree, anatomy, inputs)
            logits = logits_of(tree, anatomy, hidden[0, :1].detach(), as_tuple=as_tuple)
        except (InputError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            head = _names_below(hf, hf.get_output_embeddings(), names)
            unknown = f"what {type(hf).__name__} uses its parameters outside the blocks for could not be found"
            return Uses(head, dict.fromkeys(("embed", "unembed", "norms"), unknown), _problem(error))
    by_leaf = {id(leaf): name for name, leaf in leaves.items()}
    before, in_blocks, after = (
        frozenset(by_leaf[leaf] for leaf in _leaves(tensors) if leaf in by_leaf)
        for tensors in ([hidden], list(_tensors(arguments)), [logits])
    )
    refused: dict[str, str] = {}
    if in_blocks:
        reason = f"{min(in_blocks)} is read by the blocks themselves, not only before them"
        refused |= dict.fromkeys(("embed", "norms"), reason)
    if before & after:
        refused |= dict.fromkeys(("embed", "unembed"), f"{min(before & after)} is used before and after the blocks")
    return Uses(after, refused)


def _problem(error: Exception) -> str:
    if isinstance(error, InputError):
        return "it computes something between its blocks"
    return f"its forward cannot be taken apart at its blocks ({(str(error) or type(error).__name__).splitlines()[0]})"


def _with_leaves(hf: "PreTrainedModel", names: Sequence[str]) -> tuple["PreTrainedModel", dict[str, Tensor]]:
    """Return a copy of the tree in which each of these parameters is a tensor of its own that autograd follows."""
    device = next((buffer.device for buffer in hf.buffers() if not buffer.is_meta), torch.device("cpu"))
    tree = with_values(hf, {name: _values(hf.get_parameter(name), device) for name in names})
    leaves: dict[str, Tensor] = {}
    for name in names:
        leaf = tree.get_parameter(name)
        owner: Any = tree.get_submodule(name.rpartition(".")[0])
        if getattr(owner, "padding_idx", None) is not None and owner.padding_idx >= len(leaf):
            owner.padding_idx = None
        if leaf.is_floating_point():
            leaves[name] = leaf.requires_grad_()
    return tree, leaves


def _values(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return a parameter's own values, or zeros where it has none; of a large matrix a few rows, which no one reads."""
    if not parameter.is_meta:
        return parameter.detach()
    rows = min(len(parameter), _ROWS_READ) if parameter.numel() > 2**22 and parameter.dim() == 2 else None
    shape = tuple(parameter.shape) if rows is None else (rows, *parameter.shape[1:])
    return torch.zeros(shape, dtype=parameter.dtype, device=device)


def _names_below(hf: nn.Module, module: nn.Module | None, names: Iterable[str]) -> frozenset[str]:
    paths = [f"{path}." for path, found in hf.named_modules(remove_duplicate=False) if found is module]
    return frozenset(name for name in names if name.startswith(tuple(paths)))


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """Return the identities of the leaves that tensors were computed from, by autograd's record."""
    tensors = list(tensors)
    found = {id(tensor) for tensor in tensors if tensor.is_leaf}
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [child for child, _ in node.next_functions if child is not None]
    return found
