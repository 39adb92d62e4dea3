"""Compare the sizes that a configuration states with the headers of the weight files, before a model is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearning.checkpoints.headers import Header
from unlearning.common.errors import InputError

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
        InputError: A size is below 1, or larger than what the tensors can hold.
    """
    for name in (*_LAYERS, *_WIDTHS, *_CONTEXTS):
        value = stated.get(name)
        if type(value) is int and value < 1:
            raise InputError(f"{file}: {name} must be at least 1, got {value}; copy it again")
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


def _parts(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and those within it, such as its `text_config`."""
    parts = [stated]
    for part in parts:
        parts += [inner for inner in part.values() if isinstance(inner, dict)]
    return parts
