"""Compare the tokenizers of two models: the base's is used for both."""

import json
import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from dissect.models.model import Model

_PARTS = {
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "model": "merges or unknown token",
    "post_processor": "post-processor",
    "decoder": "decoder",
}
"""Parts of a tokenizer.json and their names. Truncation and padding are none: every call sets them anew."""

_TEXT = "Who was born in 1987 (Oslo)?\n\tÉmile doesn't  say;  naïve 北京 \U0001f642."
"""Text that tokenizers without a tokenizer.json must split alike."""


def differences(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> list[str]:
    """Return in what a tokenizer differs from the base's.

    Args:
        tokenizer: A tokenizer.
        base: The base's.

    Returns:
        The parts that differ, such as `normalizer` or `token '<x>' (None and 346)`; empty if both do the same.
    """
    if tokenizer is base:
        return []
    found = []
    ours, theirs = base.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()))[0]
        found.append(f"token {token!r} ({ours.get(token)} and {theirs.get(token)})")
    elif _added(base) != _added(tokenizer):
        found.append("way to find added tokens")
    if getattr(base, "chat_template", None) != getattr(tokenizer, "chat_template", None):
        found.append("chat template")
    parts = [_parts(each) for each in (base, tokenizer)]
    if all(parts):
        found += [name for part, name in _PARTS.items() if parts[0][part] != parts[1][part]]
    elif ours == theirs and base(_TEXT, verbose=False)["input_ids"] != tokenizer(_TEXT, verbose=False)["input_ids"]:
        found.append("way to split texts")
    return found


def warn_of_tokenizers(base: Model, other: Model) -> None:
    """Warn where the tokenizers of two models differ.

    Args:
        base: The model whose tokenizer is used for both.
        other: The other model.

    Warns:
        UserWarning: They differ in a token, a chat template, or how they treat texts.
    """
    found = differences(other.tokenizer, base.tokenizer)
    if found:
        warnings.warn(
            f"the tokenizers of {base.name} and {other.name} differ in the {', the '.join(found)}; {base.name}'s is "
            "used for both",
            stacklevel=4,
        )


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return how a fast tokenizer treats texts, by part and without its vocabulary; an empty dict for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    record = json.loads(backend.to_str())
    parts: dict[str, Any] = {part: record.get(part) for part in _PARTS}
    if isinstance(parts["model"], dict):
        parts["model"].pop("vocab", None)
    return parts
