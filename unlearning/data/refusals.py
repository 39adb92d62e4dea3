"""Refusals: answers that IDK fine-tuning and preference methods train in place of the forget answers."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unlearning.common.errors import InputError
from unlearning.common.places import is_directory
from unlearning.data.question_answer import ANSWER_KEYS
from unlearning.data.records import read_text

_TABLE_KEYS = {"question", "prompt", "text", *ANSWER_KEYS}
"""Names of columns, one of which begins a table of questions or texts."""

OWN_REFUSALS = Path(__file__).with_name("refusals.txt")

_STREAM = 2  # index of this random stream of the run's seed; streams 0 and 1 order the examples


def read_refusals(path: str | Path | None = None) -> list[str]:
    """Read refusals from a plain text file, one per line.

    Args:
        path: The file, such as TOFU's `idontknow.jsonl`, which is plain text despite its name; None takes this
            package's own refusals.

    Returns:
        The refusals, without outer white space.

    Raises:
        InputError: The file is missing or empty, is a table or JSON, or holds a line without a letter.
    """
    path = Path(path or OWN_REFUSALS)
    if is_directory(path):
        raise InputError(f"{path}: is a directory; name a text file with one refusal per line")
    refusals = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not refusals:
        raise InputError(f"{path}: the file is empty; it must hold one refusal per line")
    if path.suffix.lower() in (".csv", ".tsv") or _TABLE_KEYS & set(re.split("[,\t]", refusals[0].lower())):
        raise InputError(f"{path}: is a table with columns; write plain text, one refusal per line")
    for number, line in enumerate(refusals, start=1):
        if line[0] in "{[" or line in ("null", "true", "false"):
            raise InputError(f"{path}, refusal {number}: is JSON; write plain text, one refusal per line")
        if not any(sign.isalpha() for sign in line):
            raise InputError(f"{path}, refusal {number}: {line[:40]!r} holds no letter; write sentences, one per line")
    return refusals


def draw_refusals(n: int, refusals: Sequence[str], seed: int) -> list[str]:
    """Draw one refusal for each of n examples, as a function of the seed and the example's index alone.

    The refusals are drawn once and kept, so that epochs, workers and resumed runs see the same; the public code draws
    anew each time.

    Args:
        n: Number of examples.
        refusals: The refusals to draw from.
        seed: Random seed of the run.

    Returns:
        One refusal per example.

    Raises:
        InputError: `refusals` is empty.
    """
    if not refusals:
        raise InputError("`refusals` must hold at least one refusal, got none")
    return [refusals[int(np.random.default_rng((seed, _STREAM, index)).integers(len(refusals)))] for index in range(n)]
