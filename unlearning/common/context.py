"""Length of a model's context."""

from transformers import PreTrainedModel


def context_of(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model reads.

    Args:
        model: The model.

    Returns:
        The number in its configuration; None if there is none, or one below 1, with which XLNet says the same.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(stated) if stated is not None and stated > 0 else None
