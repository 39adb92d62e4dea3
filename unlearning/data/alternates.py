"""Alternate answers to the forget questions: the preferred side of preference methods."""

from collections.abc import Sequence

from unlearning.common.errors import InputError
from unlearning.data.question_answer import Example


def match_alternates(alternates: Sequence[Example], forget: Sequence[Example], *, source: str) -> list[list[str]]:
    """The alternate answers of each forget example, found by its prompt.

    Args:
        alternates: read with the same wrapping as the forget examples; several may have one prompt. Those of other
            prompts are passed over.
        forget: the forget examples.
        source: of the alternates, for messages.

    Raises:
        InputError: forget examples are without an alternate (how many), or an alternate is the forget answer itself,
            which would train towards what is to be forgotten.
    """
    answers: dict[str, list[str]] = {}
    for alternate in alternates:
        answers.setdefault(alternate.prompt, []).append(alternate.answer)
    missing = [example for example in forget if example.prompt not in answers]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} of the {len(forget)} forget examples have no alternate answer (the first: "
            f"{(missing[0].prompt or missing[0].answer)[-60:]!r}); give one for each, with the same prompt"
        )
    same = [e for e in forget if any(answer.strip() == e.answer.strip() for answer in answers[e.prompt])]
    if same:
        raise InputError(
            f"{source}: {len(same)} of the {len(forget)} forget examples have their own answer as an alternate (the "
            f"first: {same[0].prompt[-60:]!r}); give other answers"
        )
    return [answers[example.prompt] for example in forget]
