"""Find a decoder's blocks, attention and MLP in its Hugging Face module tree.

TransformerLens' architecture adapters have the module paths of over a hundred families, so no table is kept here.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dissect.models.experts import down_projection, feed_forward, is_below
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_RESIDUAL = frozenset({"residual", "input_tensor"})
"""Names that transformers gives to the residual stream where a module adds it."""


@dataclass(frozen=True)
class Anatomy:
    """Dotted module paths of one architecture; None for a part without its own module.

    Attributes:
        blocks: List of blocks, from the model.
        attn: Attention, from its block.
        q_proj: Query projection, from its block; None if it is fused with others.
        o_proj: Output projection of the attention, from its block.
        mlp: MLP or mixture of experts, from its block.
        down_proj: Down projection of the MLP, whose input is the coefficients, from its block; None in a mixture of
            experts.
        add_residual: The parts, `attn` or `mlp`, that add the residual stream to their output before they return it.
    """

    blocks: str
    attn: str | None
    q_proj: str | None
    o_proj: str | None
    mlp: str | None
    down_proj: str | None
    add_residual: frozenset[str] = frozenset()

    @property
    def attn_out(self) -> str | None:
        """Module whose output is what the attention alone adds to the residual stream, from its block."""
        return self.o_proj if "attn" in self.add_residual else self.attn

    @property
    def mlp_out(self) -> str | None:
        """Module whose output is what the MLP alone adds to the residual stream, from its block."""
        return self.down_proj if self.mlp is None or "mlp" in self.add_residual else self.mlp


@dataclass(frozen=True, eq=False)
class Block:
    """Modules of one block; None for a part without its own module."""

    whole: nn.Module
    attn: nn.Module | None
    q_proj: nn.Module | None
    o_proj: nn.Module | None
    mlp: nn.Module | None
    down_proj: nn.Module | None
    attn_out: nn.Module | None
    mlp_out: nn.Module | None


def architecture_of(hf: "PreTrainedModel") -> str:
    """Return the class name by which TransformerLens selects an adapter.

    It is the name of the model's class. The configuration's `architectures` can name another one; it counts only where
    TransformerLens knows no adapter of the class.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    own = type(hf).__name__
    named = (hf.config.architectures or [own])[0]
    return own if own in SUPPORTED_ARCHITECTURES else named


def find_adapter(hf: "PreTrainedModel", *, name: str) -> Any:
    """Return TransformerLens' adapter of a model's architecture; the model is neither wrapped nor changed.

    Args:
        hf: Hugging Face model; its weights need not be in memory.
        name: Name for messages.

    Returns:
        The adapter.

    Raises:
        InputError: TransformerLens has no adapter for the architecture, or not for this configuration of it.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = architecture_of(hf)
    try:
        config = build_bridge_config_from_hf(_consistent(hf.config), architecture, name, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: TransformerLens does not support {architecture}: {reason}") from None


def find_anatomy(hf: "PreTrainedModel", adapter: Any) -> Anatomy:
    """Return the module paths of an adapter; paths that one of the model's blocks does not have become None.

    Args:
        hf: Hugging Face model; its weights need not be in memory.
        adapter: TransformerLens' adapter of its architecture.

    Returns:
        The paths.

    Raises:
        InputError: The model has no list of blocks where the adapter expects it, or not every block has an attention,
            as in state-space and hybrid models.
    """
    mapping = adapter.component_mapping.get("blocks")
    if mapping is None:
        raise InputError(
            f"{type(hf).__name__} is not supported: its blocks are no list that is run once from end to end"
        )
    blocks = _blocks(hf, mapping.name)

    def has(block: nn.Module, found: str | None) -> bool:
        try:
            return isinstance(block.get_submodule(found or "-"), nn.Module)
        except AttributeError:
            return False

    def path(*components: str) -> str | None:
        found = component_path(mapping.submodules, *components)
        return found if all(has(block, found) for block in blocks) else None

    attn = path("attn")
    if attn is None:
        found = component_path(mapping.submodules, "attn")
        without = [str(layer) for layer, block in enumerate(blocks) if not has(block, found)]
        where = "its blocks have" if len(without) == len(blocks) else f"its layers {', '.join(without[:4])} have"
        raise InputError(
            f"{type(hf).__name__} is not supported: {where} no attention (a state-space or hybrid model); "
            "use a model whose blocks all hold an attention and an MLP"
        )
    d_model = int(adapter.cfg.d_model)
    mlp = path("mlp")
    if mlp is None and path("mlp", "out") is None:
        mlp = _only_mlp(blocks, d_model)
    if mlp is not None and _has_experts_beside(blocks, attn, mlp, d_model):
        mlp, down_proj = None, None  # its output is only a part of what the block's MLP and experts write together
    else:
        down_proj = path("mlp", "out") or (None if mlp is None else _down_proj(blocks, mlp, d_model))
    parts = {"attn": attn, "mlp": mlp}
    return Anatomy(
        blocks=mapping.name,
        attn=attn,
        q_proj=path("attn", "q"),
        o_proj=path("attn", "o"),
        mlp=mlp,
        down_proj=down_proj,
        add_residual=frozenset(
            part for part, at in parts.items() if at is not None and _takes_residual(blocks[0].get_submodule(at))
        ),
    )


def _consistent(config: Any) -> Any:
    """Return a configuration without a stray `num_key_value_heads`: TransformerLens reads it, the model does not."""
    field, kind = "num_key_value_heads", type(config)
    declared = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map, *dir(kind)}
    if field not in vars(config) or field in declared or not kind.__module__.startswith("transformers."):
        return config
    config = copy.deepcopy(config)
    delattr(config, field)
    return config


def _blocks(hf: "PreTrainedModel", path: str) -> nn.ModuleList:
    try:
        blocks = hf.get_submodule(path)
    except AttributeError:
        blocks = None
    if isinstance(blocks, nn.ModuleList) and not len(blocks):
        raise InputError(f"{type(hf).__name__} is not supported: its config.json gives it no layers")
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(
            f"{type(hf).__name__} is not supported: it has no list of blocks {path}, where TransformerLens expects them"
        )
    return blocks


def _only_mlp(blocks: nn.ModuleList, d_model: int) -> str | None:
    """Return the one MLP that every block has where the adapter names none, as in Granite 4 without a mixture."""
    found = {
        name
        for block in blocks
        for name, child in block.named_children()
        if down_projection(child, d_model) is not None
    }
    return found.pop() if len(found) == 1 and all(hasattr(block, *found) for block in blocks) else None


def _has_experts_beside(blocks: nn.ModuleList, attn: str, mlp: str, d_model: int) -> bool:
    """Return True if a block has experts that do not belong to its MLP, but are added to it."""
    parts = (feed_forward(block, attn, d_model) for block in blocks)
    return any(part.counts and not all(is_below(name, mlp) for name in part.sites) for part in parts)


def _down_proj(blocks: nn.ModuleList, mlp: str, d_model: int) -> str | None:
    """Return the down projection of MLPs that the adapter describes as mixtures of experts, but that all are dense."""
    (name, *others) = {down_projection(block.get_submodule(mlp), d_model) for block in blocks}
    return None if name is None or others else f"{mlp}.{name}"


def residual_of(arguments: Mapping[str, Any]) -> Any:
    """Return the residual stream among the arguments of a module that adds it to its output."""
    return next(value for name, value in arguments.items() if name in _RESIDUAL)


def _takes_residual(module: nn.Module) -> bool:
    """Return True if a module is given the residual stream beside its input, to add it to its output."""
    return not _RESIDUAL.isdisjoint(inspect.signature(module.forward).parameters)


def component_path(components: Mapping[str, Any], *keys: str) -> str | None:
    """Return the module path of a part in an adapter's tree of components.

    Args:
        components: Components that hold the first key, such as `adapter.component_mapping`.
        keys: Keys from part to part, such as `"attn", "q"`.

    Returns:
        The dotted path, or None if the adapter names no module for the part.
    """
    names: list[str] = []
    component = None
    for key in keys:
        component = components.get(key)
        if component is None:
            return None
        if component.name is not None:  # None: a part without its own module, such as OPT's MLP
            names.append(component.name)
        components = component.submodules
    return ".".join(names) if component is not None and component.name is not None else None


def block_of(hf: "PreTrainedModel", anatomy: Anatomy, layer: int) -> Block:
    """Return the modules of one layer's block.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of the model.
        layer: Index of the layer.

    Returns:
        The modules; None for a part without its own module.
    """
    return parts_of(hf.get_submodule(anatomy.blocks)[layer], anatomy)  # type: ignore[index]


def parts_of(whole: nn.Module, anatomy: Anatomy) -> Block:
    """Return the modules of a block.

    Args:
        whole: The block.
        anatomy: Module paths of its model.

    Returns:
        The modules; None for a part without its own module.
    """

    def part(path: str | None) -> nn.Module | None:
        return None if path is None else whole.get_submodule(path)

    return Block(
        whole=whole,
        attn=part(anatomy.attn),
        q_proj=part(anatomy.q_proj),
        o_proj=part(anatomy.o_proj),
        mlp=part(anatomy.mlp),
        down_proj=part(anatomy.down_proj),
        attn_out=part(anatomy.attn_out),
        mlp_out=part(anatomy.mlp_out),
    )
