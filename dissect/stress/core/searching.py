"""Run an attack by training on all models, at one strength after another, until one takes hold."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dissect.models.model import Model
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.finetuning import FineTuned, Recipe
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import FactScores, fact_scores, score_facts, uniform_answers
from dissect.stress.core.sharing import once
from dissect.stress.core.texts import TEXTS, answer_texts, text_rows
from dissect.stress.core.validity import TABLE, invalid_variants

UTILITY_FACTS = 40
"""Maximum number of retain facts on which utility after an attack is measured, evenly spaced."""


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack did to one model.

    Attributes:
        scores: Scores of the facts.
        loss_before: Loss of the taught texts before training, in nats per answer token.
        loss_after: Their loss after training.
        utility: Share of the answered retain facts that are still answered; NaN if it is not measured.
        curve: Rows of the table `curve`, without role and variant.
        texts: What the model answers under attack, one text per fact; empty if it was not asked.
    """

    scores: FactScores
    loss_before: float
    loss_after: float
    utility: float
    curve: Sequence[Mapping[str, float]] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Attempt:
    """One strength of an attack.

    Attributes:
        variant: Its name in tables.
        recipe: How models are trained.
        run: Attacks a model.
    """

    variant: str
    recipe: Recipe
    run: Callable[[Model], Attacked]


def searched(
    case: Case,
    facts: Facts,
    searches: Sequence[Sequence[Attempt]],
    empty: StressResult,
    *,
    every: bool,
    plain: Callable[[Model], FactScores] | None = None,
) -> StressResult:
    """Run every search on all models, each until an attempt takes hold.

    Args:
        case: Models and facts.
        facts: The facts that are scored.
        searches: Attempts in the order in which they are tried; all models get the same ones.
        empty: The result without values.
        every: Run every attempt, also after one that took hold.
        plain: Scores a model without attack; by default as `score_facts` does.

    Returns:
        The result with its values and the table `validity`. The settings `tried` list all attempts, and a note tells
        why each did not take hold that did not.
    """
    plain = plain or partial(score_facts, facts=facts, batch_size=case.batch_size)
    unattacked = {
        role: _scores(_once(case, empty, role, PLAIN, facts, None, partial(_plain, plain, model)))
        for role, model in case.models.items()
    }
    found: dict[tuple[str, str], Attacked] = {}
    tried: list[Attempt] = []
    for attempts in searches:
        for attempt in attempts:
            tried.append(attempt)
            for role, model in case.models.items():
                run = partial(_attack, attempt, model)
                record = _once(case, empty, role, attempt.variant, facts, attempt.recipe, run)
                found[role, attempt.variant] = Attacked(**record | {"scores": _scores(record["scores"])})
            if not every and attempt.variant not in invalid_variants(_result(empty, facts, unattacked, found)):
                break
    result = _result(empty, facts, unattacked, found)
    settings = {**empty.settings, "tried": [{"variant": one.variant, **asdict(one.recipe)} for one in tried]}
    notes = [f"{variant} did not take hold: {reason}" for variant, reason in invalid_variants(result).items()]
    return replace(result, settings=settings, notes=(*empty.notes, *notes))


def _result(
    empty: StressResult, facts: Facts, plain: Mapping[str, FactScores], found: Mapping[tuple[str, str], Attacked]
) -> StressResult:
    """Return the result with the values so far: for each role its scores without attack, then those under attack."""
    rows: list[tuple[str, str, FactScores]] = []
    for role, scores in plain.items():
        rows.append((role, PLAIN, scores))
        rows += [(role, variant, one.scores) for (of, variant), one in found.items() if of == role]
    validity = [
        {
            "role": role,
            "variant": variant,
            "loss_before": one.loss_before,
            "loss_after": one.loss_after,
            "utility": one.utility,
        }
        for (role, variant), one in found.items()
    ]
    curve = [
        {"role": role, "variant": variant, **point} for (role, variant), one in found.items() for point in one.curve
    ]
    tables = {TABLE: pd.DataFrame(validity)} | ({"curve": pd.DataFrame(curve)} if curve else {})
    everything = range(len(facts))
    texts = [(role, variant, everything, one.texts) for (role, variant), one in found.items() if one.texts]
    if texts:
        tables[TEXTS] = text_rows(texts)
    return replace(empty, frame=fact_rows(facts, rows), tables=tables)


def _once(
    case: Case,
    empty: StressResult,
    role: str,
    variant: str,
    facts: Facts,
    recipe: Recipe | None,
    compute: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Return what an attack gave; for base and control from the case's directory, if it is there."""
    if role == "unlearned" or case.shared is None:
        return compute()
    decides = [case.models[role].sha256, facts.sha256, dict(empty.settings), variant, recipe and asdict(recipe)]
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    return once(case.shared / f"{empty.test}-{role}-{name}.json", compute)


def _plain(score: Callable[[Model], FactScores], model: Model) -> dict[str, Any]:
    return _columns(score(model))


def _attack(attempt: Attempt, model: Model) -> dict[str, Any]:
    """Attack a model, and return what came out as plain data."""
    attacked = attempt.run(model)
    return {
        "scores": _columns(attacked.scores),
        "loss_before": attacked.loss_before,
        "loss_after": attacked.loss_after,
        "utility": attacked.utility,
        "curve": [dict(point) for point in attacked.curve],
        "texts": list(attacked.texts),
    }


def _columns(scores: FactScores) -> dict[str, Any]:
    return {name: values.tolist() for name, values in scores.columns().items()}


def _scores(columns: Mapping[str, Any]) -> FactScores:
    return FactScores(**{name: np.array(values, dtype=np.float64) for name, values in columns.items()})


def score_trained(trained: FineTuned, facts: Facts, *, case: Case) -> FactScores:
    """Score the facts of a fine-tuned model.

    A model whose training diverged says nothing: it is scored as if it gave all answers the same probability.

    Args:
        trained: The model with its losses.
        facts: The facts.
        case: Models and facts; gives the size of batches.

    Returns:
        The scores.
    """
    if np.isfinite(trained.loss_after):
        return score_facts(trained.model, facts, batch_size=case.batch_size)
    return fact_scores(facts, *uniform_answers(trained.model, facts))


def texts_after(trained: FineTuned, facts: Facts, model: Model, *, case: Case) -> list[str]:
    """Return what the unlearned model answers under attack, for the table of facts.

    Args:
        trained: The attacked model with its losses.
        facts: The facts.
        model: The model before the attack.
        case: Models and facts; gives the size of batches.

    Returns:
        One text per fact; none for another model than the unlearned one, or if training diverged.
    """
    if model is not case.pair.unlearned or not np.isfinite(trained.loss_after):
        return []
    return answer_texts(trained.model, facts, batch_size=case.batch_size)


class Utility:
    """Measures how many of the answered retain facts an attack leaves; an answer that beats its distractors counts.

    The answer's own probability would not do: training on answers of another form lowers it, and nothing is lost.

    Args:
        case: Models and facts; without retain facts utility is NaN.
        model: The model before the attack.
    """

    def __init__(self, case: Case, model: Model) -> None:
        self.case = case
        self.facts = None if case.retain is None else spread(case.retain, UTILITY_FACTS)
        if self.facts is not None:
            self.before = score_facts(model, self.facts, batch_size=case.batch_size).accuracy == 1

    def after(self, trained: FineTuned) -> float:
        """Return the share of the facts answered before that the trained model answers; NaN if none was."""
        if self.facts is None or not self.before.any():
            return float("nan")
        return float((score_trained(trained, self.facts, case=self.case).accuracy[self.before] == 1).mean())
