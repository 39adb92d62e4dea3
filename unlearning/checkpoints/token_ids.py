"""The tokens that end an answer, as files and configurations state them."""

import json
from pathlib import Path
from typing import Any

from unlearning.checkpoints.links import check_links
from unlearning.common.errors import InputError

GENERATION_CONFIG = "generation_config.json"


def end_tokens(value: Any, where: str) -> list[int]:
    """Read the value of an `eos_token_id`.

    Args:
        value: The value: a token's number, several in a list, or None.
        where: What states it, for messages.

    Returns:
        The tokens.

    Raises:
        InputError: It is something else.
    """
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(
            f"{where}: eos_token_id must be the number of a token or a list of numbers, got {str(value)[:60]!r}; "
            "copy it again, or correct it there"
        )
    return tokens


def check_end_tokens(path: Path, stated: dict[str, Any]) -> None:
    """Check the end tokens that a checkpoint's files state.

    Args:
        path: Directory of the checkpoint.
        stated: Content of its config.json.

    Raises:
        InputError: generation_config.json is broken or a link that leads nowhere, or an `eos_token_id` names no tokens
            (the message names the file).
    """
    end_tokens(stated.get("eos_token_id"), str(path / "config.json"))
    read_generation_config(path)


def read_generation_config(path: Path) -> list[int]:
    """Return the end tokens in a checkpoint's generation_config.json; none if there is no such file.

    Args:
        path: Directory of the checkpoint.

    Returns:
        The tokens.

    Raises:
        InputError: The file is broken, or a link that leads nowhere.
    """
    file = path / GENERATION_CONFIG
    if not file.is_file():
        check_links(path, GENERATION_CONFIG)
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{file}: broken; copy it again")
    return end_tokens(content.get("eos_token_id"), str(file))
