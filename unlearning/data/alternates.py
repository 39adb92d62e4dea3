"""Alternate answers to the forget questions: the preferred side of preference methods."""

from collections.abc import Sequence

from unlearning.common.errors import InputError
from unlearning.data.question_answer import Example, bare


def match_alternates(alternates: Sequence[Example], forget: Sequence[Example], *, source: str) -> list[list[str]]:
    """Find the alternate answers of each forget example by its prompt.

    Args:
        alternates: Read with the same wrapping as the forget examples; several may share a prompt. Alternates to
            prompts that are not in the forget set are ignored.
        forget: The forget examples.
        source: Name of the alternates' source, for messages.

    Returns:
        For each forget example its alternate answers, at least one.

    Raises:
        InputError: Forget examples have no alternate (the message says how many), or an alternate equals the forget
            answer, which would train towards the answer to be forgotten.
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
    same = [e for e in forget if bare(e.answer) in map(bare, answers[e.prompt])]
    if same:
        raise InputError(
            f"{source}: {len(same)} of the {len(forget)} forget examples have their own answer as an alternate (the "
            f"first: {same[0].prompt[-60:]!r}); give other answers"
        )
    return [answers[example.prompt] for example in forget]
