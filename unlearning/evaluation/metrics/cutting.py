"""The beginning of a text."""

from transformers import PreTrainedTokenizerBase


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, n: int) -> str:
    """A text's first n tokens as text, those that the tokenizer puts around a text among them; a shorter text as it is.

    MUSE cuts the continuations that it compares with in this way.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    return text if len(ids) <= n else str(tokenizer.decode(ids[:n], skip_special_tokens=True))
