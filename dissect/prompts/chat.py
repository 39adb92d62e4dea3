"""Tell whether prompts were wrapped in a chat template, which brings its own special tokens."""

from transformers import PreTrainedTokenizerBase

from dissect.prompts.prompts import Prompt, Prompts
from unlearning.data.chat import ChatFormat, chat_format
from unlearning.data.spans import encode_answer

_LOOKED_AT = 8
"""Number of prompts that are looked at: all prompts of a file are wrapped alike."""


def chat_of(item: Prompt, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """Return the chat template that a prompt was wrapped in; None for a prompt without one.

    Args:
        item: The prompt.
        tokenizer: The tokenizer that it was read with.

    Returns:
        The template. It adds its own special tokens, so a prompt with those of plain text is no chat.
    """
    plain = encode_answer(tokenizer, item.prompt, item.answer).input_ids
    return None if plain == list(item.input_ids) else chat_format(tokenizer)


def takes_special_tokens(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check whether prompts were tokenised with the tokenizer's special tokens; prompts of a chat template were not.

    Args:
        prompts: The prompts.
        tokenizer: The tokenizer that they were read with.

    Returns:
        True if the first prompts have the special tokens.
    """
    return all(
        encode_answer(tokenizer, item.prompt, item.answer).input_ids[: item.answer_start]
        == list(item.input_ids[: item.answer_start])
        for item in prompts.items[:_LOOKED_AT]
    )
