"""Attacks on one model: relearning step by step at several rates, and rounding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.finetuning import Recipe, fine_tuned_at
from dissect.stress.core.scores import score_facts
from dissect.stress.quantisation import check_schemes, quantised_model
from dissect.stress.relearning import same_exposure, split
from unlearning import Example
from unlearning.common.errors import InputError

CURVE = (1, 2, 4, 8, 16, 32)
"""Numbers of steps after which a relearning model is asked."""

RATES = (0.005, 0.02, 0.08)
"""Sizes of a step of relearning: the smallest, the middle and the largest rate of the verdict's search."""

SAME, OTHER = "same facts", "other facts"
"""Relearning on the questions that are asked, and on those of other groups."""

Row = Mapping[str, Any]
"""The values of one attack, rate and number of steps (see `relearning`)."""

FOLDS = 2
ROUNDED = "nf4"


def relearning(model: Model, case: Case, *, rates: Sequence[float] = RATES, curve: Sequence[int] = CURVE) -> list[Row]:
    """Relearn at every rate, and ask after every number of steps.

    Args:
        model: The model; it is not changed.
        case: The facts, with distractors; its models are not read but for the tokenizer.
        rates: Sizes of a step, as shares of the size of each tensor.
        curve: Increasing numbers of steps.

    Returns:
        Rows of `attack`, `rate`, `steps` (0: not attacked), and the means over the facts of `rank` (share of the
        distractors that the answer beats) and `correct`. On other facts, every fact is asked when its own group is held
        out, and compared with those distractors alone that the taught texts treat like its answer.
    """
    rows = unattacked(model, case)
    for attack, parts in _attacks(case).items():
        for rate in rates:
            for at, found in _curve(model, case, parts, rate, curve).items():
                rows.append({"attack": attack, "rate": rate, "steps": at, **found})
    return rows


def unattacked(model: Model, case: Case) -> list[Row]:
    """Return the rows of 0 steps (see `relearning`)."""
    rows: list[Row] = []
    for attack, parts in _attacks(case).items():
        means = _mean_of([_scores(model, case, asked, facts) for asked, _, facts in parts])
        rows.append({"attack": attack, "rate": 0.0, "steps": 0, **means})
    return rows


Part = tuple[Sequence[int], Sequence[Prompt], Facts]
"""Indices of the facts that are asked, what is taught, and the facts with the distractors that count."""


def _attacks(case: Case) -> dict[str, Sequence[Part]]:
    """Return the parts of each attack: on the asked facts themselves, or fold by fold on the others."""
    items = case.forget.prompts.items
    held: list[Part] = []
    for held_out in split(case.forget, FOLDS, seed=case.seed):
        rest = [item for index, item in enumerate(items) if index not in set(held_out)]
        told = [f"{item.prompt} {item.answer}" for item in rest]
        held.append((held_out, rest, same_exposure(case.forget, told, indices=held_out)))
    return {SAME: [(list(range(len(items))), list(items), case.forget)], OTHER: held}


def _curve(
    model: Model, case: Case, parts: Sequence[Part], rate: float, curve: Sequence[int]
) -> dict[int, dict[str, float]]:
    found: dict[int, list[dict[str, np.ndarray]]] = {}
    for asked, texts, facts in parts:
        examples = [Example(item.prompt, item.answer) for item in texts]
        for at, after in fine_tuned_at(model, examples, Recipe(rate), steps=curve, case=case):
            found.setdefault(at, []).append(_scores(after.model, case, asked, facts))
    return {at: _mean_of(scores) for at, scores in found.items()}


def _scores(model: Model, case: Case, asked: Sequence[int], facts: Facts) -> dict[str, np.ndarray]:
    scores = score_facts(model, facts.select(list(asked)), batch_size=case.batch_size)
    return {"rank": scores.rank, "correct": scores.correct}


def _mean_of(scores: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the means over all facts; a fact without distractors has no rank, a diverged model none at all."""
    joined = {name: np.concatenate([one[name] for one in scores]) for name in scores[0]}
    return {name: float(np.nanmean(values)) for name, values in joined.items()}


def rounded(model: Model, case: Case) -> float | None:
    """Return the mean rank of the answers after rounding to 4 bits; None without bitsandbytes."""
    try:
        check_schemes([ROUNDED])
    except InputError:
        return None
    after = quantised_model(model, ROUNDED)
    return float(np.nanmean(score_facts(after, case.forget, batch_size=case.batch_size).rank))


def steps_to_recover(rows: Sequence[Row], value: float) -> float:
    """Return the fewest steps after which the answers rank at least at a value, over the rates.

    Args:
        rows: Rows of one model and one attack.
        value: The mean rank.

    Returns:
        The number of steps, interpolated between two rows on the logarithmic scale; 0 if no attack is needed, infinity
        if no rate reached the value.
    """
    start = next(row["rank"] for row in rows if row["steps"] == 0)
    if start >= value:
        return 0.0
    best = math.inf
    for rate in {row["rate"] for row in rows if row["steps"] > 0}:
        before = (0.5, start)  # no step stands half a step's doubling before the first
        for row in sorted((row for row in rows if row["rate"] == rate), key=lambda row: row["steps"]):
            here = (float(row["steps"]), float(row["rank"]))
            if here[1] >= value:
                share = (value - before[1]) / (here[1] - before[1])
                best = min(best, before[0] * (here[0] / before[0]) ** share)
                break
            before = here
    return best


def most_recovered(rows: Sequence[Row], control: Sequence[Row], beyond: float) -> float:
    """Return the largest share of what the base knows beyond the control that an attack brings back.

    Args:
        rows: Rows of one model and one attack.
        control: The control's rows of the same attack; where there are none, its value before the attack counts.
        beyond: Mean rank in the base minus that in the control.

    Returns:
        The largest difference between the two after the same steps at the same rate, as a share of `beyond`.
    """
    theirs = {(row["rate"], row["steps"]): row["rank"] for row in control}
    return max((row["rank"] - theirs[row["rate"], row["steps"]]) / beyond for row in rows)
