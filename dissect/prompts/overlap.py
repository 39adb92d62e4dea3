"""Remove prompts that are forget prompts as well."""

import warnings
from dataclasses import replace

from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError


def without_shared(forget: Prompts, prompts: Prompts, name: str) -> Prompts:
    """Return the prompts that are not forget prompts, compared word for word.

    Args:
        forget: The forget prompts.
        prompts: Prompts about something else, such as retain prompts.
        name: Name of the set in messages, such as "retain".

    Returns:
        The set without forget prompts; the same object where none is shared.

    Raises:
        InputError: Every prompt is a forget prompt.

    Warns:
        UserWarning: Some prompts are forget prompts; the message says how many.
    """
    asked = {_words(item.prompt) for item in forget.items}
    kept = tuple(item for item in prompts.items if _words(item.prompt) not in asked)
    shared = len(prompts) - len(kept)
    if not kept:
        raise InputError(
            f"`{name}` must hold prompts that are not forget prompts, but all {shared} ({prompts.source}) are; give "
            "questions about something that was not to be forgotten"
        )
    if not shared:
        return prompts
    warnings.warn(
        f"{shared} of the {len(prompts)} {name} prompts are forget prompts as well and are left out", stacklevel=3
    )
    return replace(prompts, items=kept)


def _words(text: str) -> str:
    return " ".join(text.split())
