"""What models say: greedy answers to the questions about facts, for the table of facts."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from dissect.models.model import Model
from dissect.stress.core.distractors import Facts
from unlearning.evaluation.generation import greedy_answers

TEXTS = "texts"
"""Name of the table of a `StressResult` that holds the texts."""

COLUMNS = ("role", "variant", "example_index", "text")
"""Columns of the table."""

ROOM = 4
"""Number of tokens that an answer may be longer than the longest right answer."""


def answer_texts(model: Model, facts: Facts, *, batch_size: int = 64) -> list[str]:
    """Return the model's greedy answers.

    Args:
        model: A model in memory.
        facts: The facts to ask.
        batch_size: Maximum number of texts in one batch; no answer depends on it.

    Returns:
        One answer per fact, a little longer than the longest right answer if the model does not end it, and without
        anything after a line break.

    Raises:
        InputError: A question leaves no room for an answer in the model's context.
    """
    prompts = facts.prompts
    return greedy_answers(
        model.hf,
        model.tokenizer,
        [item.prompt for item in prompts.items],
        max_new_tokens=max(item.n_answer_tokens for item in prompts.items) + ROOM,
        batch_size=batch_size,
        chat=prompts.chat,
        stop_texts=("\n",),
    )


def text_rows(texts: Iterable[tuple[str, str, Sequence[int], Sequence[str]]]) -> pd.DataFrame:
    """Return the table of texts, for `StressResult.tables`.

    Args:
        texts: Role, variant (empty: without attack), indices of the facts in the result's frame, and their texts.

    Returns:
        One row per role, variant and fact, with the columns `COLUMNS`.
    """
    rows = [
        (role, variant, index, text)
        for role, variant, indices, found in texts
        for index, text in zip(indices, found, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def texts_of(tables: Mapping[str, pd.DataFrame], role: str, variant: str) -> dict[int, str]:
    """Return the texts of one role under one variant by the index of the fact; empty if none were kept."""
    if TEXTS not in tables:
        return {}
    table = tables[TEXTS]
    here = table[(table["role"] == role) & (table["variant"] == variant)]
    return dict(zip(here["example_index"].astype(int), here["text"], strict=True))
