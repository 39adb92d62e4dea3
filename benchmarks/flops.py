"""How many floating-point operations a sweep takes when every intervention is one full forward.

A multiply-add is two operations. Counted are the linear layers, the attention scores (QK and AV over the whole square,
as eager attention computes them) and the head at all positions; norms, rotations and activations are not.
"""

from typing import Any


def forward_flops(config: Any, *, rows: int, positions: int) -> int:
    """Count the floating-point operations of one forward pass of a Llama.

    Args:
        config: Hugging Face configuration of the model.
        rows: Examples in the batch.
        positions: Tokens of each example, padding included.

    Returns:
        Multiplications and additions in products of matrices.
    """
    d_model, d_mlp = config.hidden_size, config.intermediate_size
    d_head = getattr(config, "head_dim", None) or d_model // config.num_attention_heads
    d_query, d_key = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    weights = d_model * (2 * d_query + 2 * d_key + 3 * d_mlp)
    scores = 2 * positions * d_query
    per_token = config.num_hidden_layers * (weights + scores) + d_model * config.vocab_size
    return 2 * per_token * rows * positions


def naive_sweep_flops(config: Any, *, rows: int, positions: int, interventions: int) -> int:
    """Count the operations of one forward pass of the base, one of the unlearned model and one per intervention.

    Args:
        config: Hugging Face configuration of the models.
        rows: Examples in the batch.
        positions: Tokens of each example, padding included.
        interventions: Number of interventions.

    Returns:
        Multiplications and additions in products of matrices.
    """
    return (2 + interventions) * forward_flops(config, rows=rows, positions=positions)
