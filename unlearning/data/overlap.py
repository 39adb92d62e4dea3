"""How much of the forget set is in the retain set too."""

from collections.abc import Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError
from unlearning.data.question_answer import Example


@dataclass(frozen=True)
class Overlap:
    """Counts of forget examples, white space aside.

    Attributes:
        rows: those that are in the retain set word for word, prompt and answer.
        prompts: those whose prompt is in the retain set, with whatever answer; documents have no prompt.
        forget: all of them.
        first: one of `rows`, cut short; empty where there are none.
    """

    rows: int
    prompts: int
    forget: int
    first: str = ""


def overlap(forget: Sequence[Example], retain: Sequence[Example]) -> Overlap:
    """Compare a forget set with a retain set."""
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
    """Refuse a retain set that holds forget examples; say where it shares prompts only.

    Returns:
        Notes: one where prompts are shared under other answers, else none.

    Raises:
        InputError: rows are shared (how many).
    """
    found = overlap(forget, retain)
    if found.rows:
        raise InputError(
            f"forget and retain overlap: {found.rows} of the {found.forget} forget rows are in the retain data too "
            f"(the first: {found.first!r}); take them out of one"
        )
    if found.prompts:
        return (f"{found.prompts} of the {found.forget} forget prompts are in the retain data with another answer",)
    return ()


def _row(example: Example) -> tuple[str, str]:
    return _plain(example.prompt), _plain(example.answer)


def _plain(text: str) -> str:
    return " ".join(text.split())
