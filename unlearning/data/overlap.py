"""Overlap of the forget set with the retain set."""

from collections.abc import Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError
from unlearning.data.question_answer import Example


@dataclass(frozen=True)
class Overlap:
    """Counts of forget examples that the retain set shares, white space aside.

    Attributes:
        rows: Number of forget examples whose prompt and answer are in the retain set word for word.
        prompts: Number of forget examples whose prompt is in the retain set, with any answer; documents have no prompt.
        forget: Number of all forget examples.
        first: The first of `rows`, cut to 60 characters; empty if `rows` is 0.
    """

    rows: int
    prompts: int
    forget: int
    first: str = ""


def overlap(forget: Sequence[Example], retain: Sequence[Example]) -> Overlap:
    """Return how many forget examples the retain set shares."""
    kept_rows = {_row(example) for example in retain}
    kept_prompts = {_plain(example.prompt) for example in retain if example.prompt}
    shared = [example for example in forget if _row(example) in kept_rows]
    return Overlap(
        rows=len(shared),
        prompts=sum(_plain(example.prompt) in kept_prompts for example in forget),
        forget=len(forget),
        first=_plain(shared[0].prompt or shared[0].answer)[-60:] if shared else "",
    )


def refuse_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> tuple[str, ...]:
    """Check that the retain set holds no forget example.

    Args:
        forget: The forget set.
        retain: The retain set.

    Returns:
        One note if the two share prompts under different answers, else none.

    Raises:
        InputError: The two share examples (the message says how many).
    """
    found = overlap(forget, retain)
    if found.rows:
        raise InputError(
            f"`forget` and `retain` overlap: {found.rows} of the {found.forget} forget rows are in the retain data too "
            f"(the first: {found.first!r}); take them out of one"
        )
    if found.prompts:
        return (f"{found.prompts} of the {found.forget} forget prompts are in the retain data with another answer",)
    return ()


def _row(example: Example) -> tuple[str, str]:
    return _plain(example.prompt), _plain(example.answer)


def _plain(text: str) -> str:
    return " ".join(text.split())
