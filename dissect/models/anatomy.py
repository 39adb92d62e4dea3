"""Find a decoder's blocks, attention and MLP in its Hugging Face module tree.

TransformerLens' architecture adapters have the module paths of over a hundred families, so no table is kept here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """

    blocks: str
    attn: str | None
    q_proj: str | None
    o_proj: str | None
    mlp: str | None
    down_proj: str | None


@dataclass(frozen=True, eq=False)
class Block:
    """Modules of one block; None for a part without its own module."""

    whole: nn.Module
    attn: nn.Module | None
    q_proj: nn.Module | None
    o_proj: nn.Module | None
    mlp: nn.Module | None
    down_proj: nn.Module | None


def architecture_of(hf: "PreTrainedModel") -> str:
    """Return the class name by which TransformerLens selects an adapter, also for a model built by `from_config`."""
    return (hf.config.architectures or [type(hf).__name__])[0]


def find_adapter(hf: "PreTrainedModel", *, name: str) -> Any:
    """Return TransformerLens' adapter of a model's architecture; the model is neither wrapped nor changed.

    Args:
        hf: Hugging Face model.
        name: Name for messages.

    Returns:
        The adapter.

    Raises:
        InputError: TransformerLens has no adapter for the architecture.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = architecture_of(hf)
    try:
        config = build_bridge_config_from_hf(hf.config, architecture, name, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise InputError(
            f"{name}: TransformerLens does not support {architecture}: {str(error).splitlines()[0]}"
        ) from None


def find_anatomy(hf: "PreTrainedModel", adapter: Any) -> Anatomy:
    """Return the module paths of an adapter; paths that the model's first block does not have become None."""
    mapping = adapter.component_mapping["blocks"]
    first = hf.get_submodule(mapping.name)[0]  # type: ignore[index]

    def path(*components: str) -> str | None:
        found = component_path(mapping.submodules, *components)
        try:
            first.get_submodule(found or "-")
        except AttributeError:
            return None
        return found

    return Anatomy(
        blocks=mapping.name,
        attn=path("attn"),
        q_proj=path("attn", "q"),
        o_proj=path("attn", "o"),
        mlp=path("mlp"),
        down_proj=path("mlp", "out"),
    )


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
    )
