"""Compare the sizes that a configuration states with the headers of the weight files, before a model is built."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.checkpoints.headers import Header
from unlearning.common.errors import InputError, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "depth")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_inner",
    "n_head",
    "d_model",
    "ffn_dim",
    "word_embed_proj_dim",
)

CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "num_selected_experts",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
"""Names that configurations have for the number of experts that a router chooses for a token."""

_TEXT = ("text_config", "decoder", "generator")
"""Where transformers looks for the part of a configuration that is the language model's."""

_CONTEXTS = ("max_position_embeddings", "n_positions")

_SMALL = 128
"""Layers and experts that are built in a moment, whatever is on disk."""


def check_sizes(stated: Mapping[str, Any], headers: Mapping[str, Header], file: Path) -> None:
    """Check that the sizes that a configuration states are positive, and that the tensors on disk can have them.

    Args:
        stated: Content of a config.json.
        headers: Header of every tensor on disk, by name; empty if they are not known.
        file: The config.json, for messages.

    Raises:
        InputError: A size is below 1, or larger than what the tensors can hold, or a part is no JSON object.
    """
    for name in (*_LAYERS, *_WIDTHS, *_CONTEXTS):
        value = stated.get(name)
        if type(value) is int and value < 1:
            raise InputError(f"{file}: {name} must be at least 1, got {value}; copy it again")
    for name in _TEXT:
        if not isinstance(stated.get(name), Mapping | None):
            raise InputError(f"{file}: {name} must be a JSON object, got {_shown(stated[name])}; copy it again")
    if not headers:
        return
    n_values = sum(header.n_values for header in headers.values())
    largest = max(max(header.shape, default=1) for header in headers.values())
    limits = (
        (_LAYERS, max(len(headers), _SMALL), f"{len(headers)} tensors"),
        (_EXPERTS, max(largest, _SMALL), f"no tensor with more than {largest} rows or columns"),
        (_WIDTHS, max(2 * n_values, _SMALL**2), f"{n_values:,} values"),  # four-bit weights are two in a byte
    )
    for part in _parts(stated):
        for names, limit, what in limits:
            for name in names:
                value = part.get(name)
                numbers = [each for each in (value if isinstance(value, list) else [value]) if type(each) is int]
                if numbers and max(numbers) > limit:
                    raise InputError(
                        f"{file}: {name} is {max(numbers)}, and the weights beside it hold {what}; the files do not "
                        "belong together"
                    )


def check_parts(config: "PretrainedConfig", file: Path) -> None:
    """Check that a configuration has the parts that its class needs, and that its routers can choose their experts.

    Args:
        config: The configuration as transformers read it, with the defaults of its class.
        file: The config.json, for messages.

    Raises:
        InputError: It has a text_config that its class does not know, or routers that choose no expert or more experts
            than there are.
    """
    for name in _TEXT:
        part = getattr(config, name, None)
        if isinstance(part, Mapping):
            raise InputError(f"{file}: model_type {config.model_type} has no {name}; remove it, or copy the file again")
    for part in (config, config.get_text_config()):
        n_experts = next((n for name in _EXPERTS if type(n := getattr(part, name, None)) is int and n > 0), None)
        for name in CHOSEN_EXPERTS:
            chosen = getattr(part, name, None)
            if n_experts is None or chosen is None or isinstance(chosen, list):  # a number per layer
                continue
            if type(chosen) is not int or not 1 <= chosen <= n_experts:
                raise InputError(
                    f"{file}: {name} must be a number from 1 to the {n_experts} experts, got {_shown(chosen)}; copy it "
                    "again"
                )


def _shown(value: Any) -> str:
    return shortened(json.dumps(value))


def _parts(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and those within it, such as its `text_config`."""
    parts = [stated]
    for part in parts:
        parts += [inner for inner in part.values() if isinstance(inner, dict)]
    return parts
