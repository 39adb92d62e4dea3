"""Answers that refuse: what IDK fine-tuning and preference methods put in place of the forget answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unlearning.common.errors import InputError
from unlearning.data.records import read_text

OWN_REFUSALS = Path(__file__).with_name("refusals.txt")

_STREAM = 2  # of the run's seed; 0 and 1 order the examples


def read_refusals(path: str | Path | None = None) -> list[str]:
    """Refusals from a plain text file, one a line; without a file, this package's own.

    TOFU's `idontknow.jsonl` is such a file, whatever its name says.

    Raises:
        InputError: the file is missing or empty, or holds JSON.
    """
    path = Path(path or OWN_REFUSALS)
    if path.is_dir():
        raise InputError(f"{path}: a directory; name a text file with one refusal a line")
    refusals = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not refusals:
        raise InputError(f"{path}: the file is empty; it should hold one refusal a line")
    for number, line in enumerate(refusals, start=1):
        if line[0] in "{[":
            raise InputError(f"{path}, refusal {number}: JSON; write plain text, one refusal a line")
    return refusals


def draw_refusals(n: int, refusals: Sequence[str], seed: int) -> list[str]:
    """One refusal for each of n examples: a function of the seed and the example's place, and of nothing else.

    Drawn once and kept, so that epochs, workers and resumed runs see the same; the public code draws again each time.

    Raises:
        InputError: there are no refusals to draw from.
    """
    if not refusals:
        raise InputError("there are no refusals to draw from; give at least one")
    return [refusals[int(np.random.default_rng((seed, _STREAM, place)).integers(len(refusals)))] for place in range(n)]
