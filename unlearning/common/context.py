"""Length of a model's context."""

from typing import Any

from transformers import PreTrainedModel


def context_of(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model reads.

    Args:
        model: The model.

    Returns:
        The number in its configuration, or the one that its rotary table is stretched to (linear, YaRN) if that is
        larger; None if there is none, or one below 1, with which XLNet says the same.
    """
    stated, rope = _stated(model)
    if stated is None or rope.get("rope_type") not in ("linear", "yarn"):
        return stated
    original = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(original * rope.get("factor", 1)))


def why_no_longer(model: PreTrainedModel) -> str:
    """Return why longer texts are refused although the model's rotary scaling is for such; "" for other models.

    Args:
        model: The model.

    Returns:
        A clause for the end of a message.
    """
    stated, rope = _stated(model)
    if rope.get("rope_type") != "dynamic":
        return ""
    return (
        f" (beyond {stated}, its dynamic rotary scaling computes every text with the frequencies of the longest text "
        "so far, so that no score could be repeated)"
    )


def _stated(model: PreTrainedModel) -> tuple[int | None, dict[str, Any]]:
    """Return the context in the configuration, and its one set of rotary parameters."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    return (
        int(stated) if stated is not None and stated > 0 else None,
        rope if isinstance(rope, dict) else {},
    )
