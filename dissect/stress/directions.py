"""Remove the direction that tells what was to be forgotten from what was to stay, or walk against it.

    ablation    x <- x - (x . d) d / |d|^2    at block outputs, every token position
    steering    x <- x - a d                  at one block's output, every token position

`own_direction`: d = mean state on forget questions - mean state on retain questions, both of the model that is
attacked: nothing comes from the base (2409.18025's variant without the original model). `oracle_direction`: d = mean
state of the attacked model - mean state of the base, on forget questions: the base says where to look.

States are block outputs at each question's last token, which predicts the answer's first. Questions are dealt into
folds by group: the direction that a fact is tested with comes from other folds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.edits import Edit, outputs_edited
from dissect.stress.core.residual_stream import states_at
from dissect.stress.core.result import PLAIN, EvidenceLevel, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.bootstrap import clusters
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress

Directions = Float[Tensor, "fold layer d_model"]


@dataclass(frozen=True)
class _Variant:
    """At which layers what is done: the direction removed (`alpha` None), or subtracted so many times."""

    layers: tuple[int, ...]
    alpha: float | None = None


def own_direction(
    case: Case,
    *,
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = (1.0, 2.0, 4.0),
    folds: int = 2,
    random: int = 1,
    limit: int = 40,
) -> StressResult:
    """Remove each model's own direction of forget questions, and steer against it.

    Variants: removed in all layers (each layer's own direction), in each of `layers` alone, and subtracted alpha times
    in the middle one of those.

    Args:
        case: models and facts, with retain facts; directions are estimated from all of them.
        layers: where it is removed singly; by default the middle layer and the last one.
        alphas: how many times it is subtracted; none for no steering.
        folds: into which groups are dealt.
        random: controls of the ablation in all layers, beside the result in the table `random`: a change as large at
            every position, in a random direction.
        limit: most facts that are tested.

    Raises:
        InputError: no retain facts, fewer groups than folds, a layer that the models do not have.
    """
    if case.retain is None:
        raise InputError("the direction is the difference from questions that were to stay: give retain prompts")
    retain = spread(case.retain, len(case.forget)).prompts

    def estimate(model: Model, fold: Int[np.ndarray, " fact"]) -> Directions:
        forget = last_states(model, case.forget.prompts, case.batch_size)
        stay = last_states(model, retain, case.batch_size).mean(1)
        return torch.stack([forget[:, fold != number].mean(1) - stay for number in range(folds)])

    n_layers = case.pair.n_layers
    chosen = (n_layers // 2, n_layers - 1) if layers is None else tuple(layers)
    variants = _ablations(n_layers, chosen)
    middle = chosen[(len(chosen) - 1) // 2] if chosen else n_layers // 2
    for alpha in alphas:
        variants[f"steered at layer {middle} x {alpha:g}"] = _Variant((middle,), alpha)
    return _run(
        case,
        "own_direction",
        3,
        estimate,
        variants,
        folds,
        random,
        limit,
        alphas=alphas,
        proves=(
            "Above zero: answers come back when the unlearned model's own mark of what was to be forgotten is taken "
            "off its states, so it holds them behind that mark. At zero: no single direction hides them."
        ),
    )


def oracle_direction(
    case: Case, *, layers: Sequence[int] | None = None, folds: int = 2, random: int = 1, limit: int = 40
) -> StressResult:
    """Remove the direction in which unlearning moved the states of forget questions, taken from the base.

    Arguments as in `own_direction`. The same for the never model, with its own distance from the base.

    Raises:
        InputError: fewer groups than folds, a layer that the models do not have.
    """
    known: dict[str, Float[Tensor, "layer fact d_model"]] = {}

    def estimate(model: Model, fold: Int[np.ndarray, " fact"]) -> Directions:
        if not known:
            known["base"] = last_states(case.pair.base, case.forget.prompts, case.batch_size)
        moved = last_states(model, case.forget.prompts, case.batch_size) - known["base"]
        return torch.stack([moved[:, fold != number].mean(1) for number in range(folds)])

    n_layers = case.pair.n_layers
    chosen = (n_layers // 2, n_layers - 1) if layers is None else tuple(layers)
    return _run(
        case,
        "oracle_direction",
        2,
        estimate,
        _ablations(n_layers, chosen),
        folds,
        random,
        limit,
        alphas=(),
        proves=(
            "Above zero: answers come back when the mean shift from the base is taken off, so what reads them is "
            "there; the base said which direction that is. At zero: no single direction hides them."
        ),
    )


def _ablations(n_layers: int, layers: Sequence[int]) -> dict[str, _Variant]:
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise InputError(f"a direction at layer {layer}: the models have layers 0 to {n_layers - 1}")
    singly = {f"removed at layer {layer}": _Variant((layer,)) for layer in layers}
    return {"removed in all layers": _Variant(tuple(range(n_layers)))} | singly


def _run(
    case: Case,
    test: str,
    level: EvidenceLevel,
    estimate: Callable[[Model, Int[np.ndarray, " fact"]], Directions],
    variants: Mapping[str, _Variant],
    folds: int,
    random: int,
    limit: int,
    *,
    alphas: Sequence[float],
    proves: str,
) -> StressResult:
    clock = time.monotonic()
    if random < 0:
        raise InputError(f"{test}: {random} random directions; give 0 or more")
    fold = dealt(case.forget.groups, folds, seed=case.seed)
    facts = spread(case.forget, limit)
    places = {id(item): place for place, item in enumerate(case.forget.prompts.items)}
    tested = [places[id(item)] for item in facts.prompts.items]
    rows, controls = [], []
    with Progress(len(case.models) * (len(variants) + random + 1), test, show=case.progress) as bar:
        for role, model in case.models.items():
            directions = estimate(model, fold)
            scorer = _Scorer(model, facts, fold[tested], directions, case.batch_size)
            rows.append((role, PLAIN, scorer.plain()))
            bar.advance(1)
            for name, variant in variants.items():
                rows.append((role, name, scorer(variant)))
                bar.advance(1)
            for draw in range(random):
                scores = scorer(variants["removed in all layers"], random=case.seed + draw)
                means = {name: float(np.nanmean(values)) for name, values in scores.columns().items()}
                controls.append({"role": role, "variant": "removed in all layers", "draw": draw} | means)
                bar.advance(1)
    return StressResult(
        test=test,
        level=level,
        measure="rank",
        frame=fact_rows(facts, rows),
        proves=proves,
        settings={
            "layers": [list(variant.layers) for variant in variants.values()],
            "alphas": list(alphas),
            "folds": folds,
            "random": random,
            "n_facts": len(facts),
            "seed": case.seed,
        },
        seconds=time.monotonic() - clock,
        seed=case.seed,
        tables={"random": pd.DataFrame(controls, columns=["role", "variant", "draw", *MEASURES])},
    )


def dealt(groups: Sequence[str], folds: int, *, seed: int) -> Int[np.ndarray, " fact"]:
    """The fold of each fact: whole groups (facts, where there are no groups), dealt in an order drawn by the seed.

    Raises:
        InputError: fewer than two folds, or fewer groups than folds.
    """
    cluster = clusters(groups)
    n = int(cluster.max()) + 1
    if not 2 <= folds <= n:
        raise InputError(f"{folds} folds of {n} groups of facts: give from 2 to {n}, so that each is tested by others")
    return np.asarray(np.random.default_rng(seed).permutation(n)[cluster] % folds)


def last_states(model: Model, prompts: Prompts, batch_size: int) -> Float[Tensor, "layer fact d_model"]:
    """What every block hands on at each question's last token; answers are not read."""
    questions = [
        replace(
            item,
            input_ids=item.input_ids[: item.answer_start],
            scored=range(item.answer_start - 1, item.answer_start),
        )
        for item in prompts.items
    ]
    return states_at(model, prompts, questions, batch_size=batch_size)[1:]


class _Scorer:
    """Scores a model's facts with each fold's directions removed."""

    def __init__(
        self, model: Model, facts: Facts, fold: Int[np.ndarray, " fact"], directions: Directions, batch_size: int
    ) -> None:
        self._model, self._batch_size, self._directions = model, batch_size, directions
        self._n = len(facts)
        self._places = {int(number): np.flatnonzero(fold == number) for number in np.unique(fold)}
        self._facts = {number: facts.select(places.tolist()) for number, places in self._places.items()}

    def plain(self) -> FactScores:
        """The scores of the model as it is."""
        return self._together(lambda facts, _number: score_facts(self._model, facts, batch_size=self._batch_size))

    def __call__(self, variant: _Variant, random: int | None = None) -> FactScores:
        """The scores under a variant; with a seed, in random directions."""

        def score(facts: Facts, number: int) -> FactScores:
            edits = {
                block_of(self._model.hf, self._model.anatomy, layer).whole: edit_of(
                    self._directions[number, layer], variant.alpha, None if random is None else (random, number, layer)
                )
                for layer in variant.layers
            }
            with outputs_edited(edits, pointwise=True):
                return score_facts(self._model, facts, batch_size=self._batch_size)

        return self._together(score)

    def _together(self, score: Callable[[Facts, int], FactScores]) -> FactScores:
        columns = {name: np.full(self._n, np.nan) for name in MEASURES}
        for number, facts in self._facts.items():
            for name, values in score(facts, number).columns().items():
                columns[name][self._places[number]] = values
        return FactScores(**columns)


def edit_of(
    direction: Float[Tensor, " d_model"], alpha: float | None, random: tuple[int, int, int] | None = None
) -> Edit:
    """What is done to states.

    Args:
        direction: of any length; where it is zero nothing is done.
        alpha: how often it is subtracted; None to remove the states' part along it.
        random: seed of a random direction in which a part of that size is subtracted instead.
    """
    if alpha is not None:
        return lambda states: states - alpha * direction.to(states)
    length = direction.norm()
    unit = direction / length if length > 0 else direction
    taken = unit
    if random is not None:
        generator = torch.Generator().manual_seed(int(np.random.default_rng(random).integers(2**31)))
        drawn = torch.randn(direction.shape, generator=generator)
        taken = drawn / drawn.norm()

    def remove(states: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        return states - (states @ unit.to(states))[..., None] * taken.to(states)

    return remove
