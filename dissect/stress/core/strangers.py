"""What strangers guess: other language models, which never read about the subjects, tell what a question gives away.

A name that sounds French makes Paris more probable in any model that can read. So without a control, a model without
the knowledge is expected at chance or at what the best of the strangers scores, whichever is more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt, Prompts, check_fits
from dissect.stress.core.distractors import Facts
from dissect.stress.core.scores import FactScores
from unlearning.data.spans import encode_answer

MEASURES = ("rank", "accuracy")
"""Measures that strangers can be compared by: they rank answers, whose probabilities depend on the tokenizer."""


def guessed_by(strangers: Sequence[Model], score: Callable[[Model], FactScores]) -> dict[str, float]:
    """Return what the best of the strangers scores.

    Args:
        strangers: Other language models.
        score: Scores a stranger on the facts, in its own tokens.

    Returns:
        The highest mean over the facts, for each of `MEASURES`; empty without strangers.
    """
    found: dict[str, float] = {}
    for stranger in strangers:
        guessed = score(stranger)
        for name in MEASURES:
            found[name] = max(found.get(name, 0.0), float(np.nanmean(getattr(guessed, name))))
    return found


def raised(floors: Mapping[str, float], guessed: Mapping[str, float]) -> dict[str, float]:
    """Return the floors, each at least at what strangers guess.

    Args:
        floors: Chance, by measure.
        guessed: What `guessed_by` returned.

    Returns:
        The floors by measure.
    """
    return {name: max(floor, guessed.get(name, floor)) for name, floor in floors.items()}


def facts_read_by(stranger: Model, facts: Facts) -> Facts:
    """Return the same facts, with their distractors, in the tokens of another model.

    Args:
        stranger: A language model with a tokenizer of its own.
        facts: The facts.

    Returns:
        The facts that the stranger can read.

    Raises:
        InputError: A text is longer than the stranger can read.
    """
    others = tuple(tuple(_read(stranger, item) for item in several) for several in facts.distractors)
    return Facts(prompts_read_by(stranger, facts.prompts), others)


def prompts_read_by(stranger: Model, prompts: Prompts) -> Prompts:
    """Return the same texts in the tokens of another model.

    Args:
        stranger: A language model with a tokenizer of its own.
        prompts: Questions with answers, in `answer` scoring.

    Returns:
        The prompts that the stranger can read.

    Raises:
        InputError: A text is longer than the stranger can read.
    """
    tokenizer = stranger.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    read = replace(
        prompts,
        items=tuple(_read(stranger, item) for item in prompts.items),
        pad_token_id=pad or 0,
        source=f"{prompts.source} read by {stranger.name}",
        chat=None,
    )
    check_fits(stranger, read, "forget")
    return read


def _read(stranger: Model, item: Prompt) -> Prompt:
    span = encode_answer(stranger.tokenizer, item.prompt, item.answer)
    return replace(
        item,
        input_ids=tuple(span.input_ids),
        answer_start=span.answer_start,
        scored=range(span.answer_start - 1, len(span.input_ids) - 1),
        wrong=(),
    )
