"""How many floating-point operations a sweep takes when every intervention is one full forward.

A multiply-add is two operations. Counted are the linear layers, the attention scores (QK and AV over the whole square,
as eager attention computes them) and the head at all positions; norms, rotations and activations are not.
"""

from typing import Any


def forward_flops(config: Any, *, rows: int, positions: int) -> int:
    """Of one forward pass of a Llama over `rows` of `positions` tokens.

    Args:
        config: its Hugging Face configuration.
        rows: examples in the batch.
        positions: tokens of each, padding included.
    """
    d_model, d_mlp = config.hidden_size, config.intermediate_size
    d_head = getattr(config, "head_dim", None) or d_model // config.num_attention_heads
    d_query, d_key = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    weights = d_model * (2 * d_query + 2 * d_key + 3 * d_mlp)
    scores = 2 * positions * d_query
    per_token = config.num_hidden_layers * (weights + scores) + d_model * config.vocab_size
    return 2 * per_token * rows * positions


def naive_sweep_flops(config: Any, *, rows: int, positions: int, interventions: int) -> int:
    """Of a sweep that runs the base once, the unlearned model once, and it once more per intervention."""
    return (2 + interventions) * forward_flops(config, rows=rows, positions=positions)
