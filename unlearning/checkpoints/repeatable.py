"""Tokenizers that split a text at random: the same prompt would have other tokens each time it is read."""

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError

_SAMPLING = ("dropout", "alpha", "nbest_size")
"""Attributes of BPE and unigram models of tokenizers that make them split at random."""

_TEXT = "Where was the author of these unforgettable international novels born? Nowhere in particular. " * 4


def without_sampling(tokenizer: PreTrainedTokenizerBase, *, name: str) -> PreTrainedTokenizerBase:
    """Switch off what makes a tokenizer split texts at random, in place.

    Args:
        tokenizer: The tokenizer.
        name: Its name, for messages.

    Returns:
        The tokenizer.

    Raises:
        InputError: It splits a text at random for another reason.

    Warns:
        UserWarning: Something was switched off.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    sampling = [field for field in _SAMPLING if getattr(model, field, None)]
    for field in sampling:
        setattr(model, field, None)
    if sampling:
        warnings.warn(
            f"{name}: its tokenizer splits texts at random ({sampling[0]}), which is switched off: a score needs the "
            "same tokens each time",
            stacklevel=3,
        )
    check_repeatable(tokenizer, name=name)
    return tokenizer


def check_repeatable(tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Check that a tokenizer splits a text the same each time.

    Args:
        tokenizer: The tokenizer.
        name: Its name, for messages.

    Raises:
        InputError: It does not.
    """
    first, *others = (tokenizer(_TEXT, verbose=False)["input_ids"] for _ in range(4))
    if any(other != first for other in others):
        raise InputError(
            f"{name}: its tokenizer splits the same text at random; switch its sampling off (dropout, or "
            "enable_sampling in sp_model_kwargs)"
        )
