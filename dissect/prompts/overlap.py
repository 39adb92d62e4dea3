"""Drop unrelated prompts that are also forget prompts."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    pass


def without_shared(forget: Prompts, unrelated: Prompts, name: str) -> Prompts:
    """The unrelated prompts less those that are forget prompts, word for word.

    Raises:
        InputError: none is left.

    Warns:
        UserWarning: some are forget prompts (how many).
    """
    asked = {_same(item.prompt) for item in forget.items}
    kept = tuple(item for item in unrelated.items if _same(item.prompt) not in asked)
    shared = len(unrelated) - len(kept)
    if not kept:
        raise InputError(
            f"--unrelated: all {shared} {name} prompts ({unrelated.source}) are forget prompts; give questions about "
            "something that was not to be forgotten"
        )
    if not shared:
        return unrelated
    warnings.warn(
        f"{shared} of the {len(unrelated)} {name} prompts are forget prompts too, and are left out", stacklevel=3
    )
    return replace(unrelated, items=kept)


def _same(text: str) -> str:
    return " ".join(text.split())
