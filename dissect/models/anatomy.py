"""Where a decoder's blocks, attention and MLP sit in its Hugging Face module tree.

TransformerLens' architecture adapters know that for over a hundred families; no table is kept here.
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
    """Dotted module paths of one architecture; None where it has no module of its own for a part.

    Attributes:
        blocks: the list of blocks, from the model.
        attn: the attention, from its block.
        q_proj: its query projection, where that is a module of its own.
        o_proj: its output projection.
        mlp: the MLP, from its block; a mixture of experts where there is one.
        down_proj: the MLP's down projection, whose input are the coefficients; None in a mixture of experts.
    """

    blocks: str
    attn: str | None
    q_proj: str | None
    o_proj: str | None
    mlp: str | None
    down_proj: str | None


@dataclass(frozen=True, eq=False)
class Block:
    """The modules of one block."""

    whole: nn.Module
    attn: nn.Module | None
    q_proj: nn.Module | None
    o_proj: nn.Module | None
    mlp: nn.Module | None
    down_proj: nn.Module | None


def architecture_of(hf: "PreTrainedModel") -> str:
    """The class name that TransformerLens' adapters go by; a model built by `from_config` does not carry it."""
    return (hf.config.architectures or [type(hf).__name__])[0]


def find_adapter(hf: "PreTrainedModel", *, name: str) -> Any:
    """TransformerLens' adapter of a model's architecture, which neither wraps nor changes the model.

    Raises:
        InputError: TransformerLens has none.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = architecture_of(hf)
    try:
        config = build_bridge_config_from_hf(hf.config, architecture, name, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise InputError(f"{name}: TransformerLens cannot open {architecture}: {str(error).splitlines()[0]}") from None


def find_anatomy(hf: "PreTrainedModel", adapter: Any) -> Anatomy:
    """Read the module paths out of an adapter; those that the model's first block does not have become None."""
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
    """Module path of a part of an adapter's tree of components, None where it names none.

    Args:
        components: where the first key is looked up, as `adapter.component_mapping`.
        keys: from part to part, as `"attn", "q"`.
    """
    names: list[str] = []
    component = None
    for key in keys:
        component = components.get(key)
        if component is None:
            return None
        if component.name is not None:  # a part without a module of its own, as OPT's MLP
            names.append(component.name)
        components = component.submodules
    return ".".join(names) if component is not None and component.name is not None else None


def block_of(hf: "PreTrainedModel", anatomy: Anatomy, layer: int) -> Block:
    """The modules of one layer's block."""
    return parts_of(hf.get_submodule(anatomy.blocks)[layer], anatomy)  # type: ignore[index]


def parts_of(whole: nn.Module, anatomy: Anatomy) -> Block:
    """The modules of a block."""

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
