"""Remove the direction that distinguishes forget questions from retain questions, or steer against it.

    ablation    x <- x - (x . d) d / |d|^2    at block outputs, every token position
    steering    x <- x - a d                  at one block's output, every token position

`own_direction`: d = mean state on forget questions - mean state on retain questions, both of the attacked model, so
that nothing comes from the base (2409.18025's variant without the original model). `oracle_direction`: d = mean state
of the attacked model - mean state of the base, on forget questions, so that the base says where to look.

States are block outputs at each question's last token, which predicts the answer's first token. Questions are split
into folds by group: the direction that a fact is tested with comes from the other folds.
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
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress

Directions = Float[Tensor, "fold layer d_model"]


@dataclass(frozen=True)
class _Variant:
    """Layers to change, and how: the direction is removed (`alpha` None), or subtracted `alpha` times."""

    layers: tuple[int, ...]
    alpha: float | None = None


@dataclass(frozen=True)
class _Attack:
    """Description of a test that removes directions.

    Attributes:
        test: Name of the test.
        level: Evidence level of the test.
        proves: What the test can and cannot show.
        estimate: Function from a model and the fold of every fact to the directions of every fold.
        variants: The variants by name.
        alphas: Factors of the subtracted direction.
        folds: Number of folds of the groups.
        random: Number of random directions for comparison.
    """

    test: str
    level: EvidenceLevel
    proves: str
    estimate: Callable[[Model, Int[np.ndarray, " fact"]], Directions]
    variants: Mapping[str, _Variant]
    alphas: Sequence[float]
    folds: int
    random: int


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

    Variants: the direction removed in all layers (each layer's own direction), removed in each of `layers` alone, and
    subtracted alpha times in the middle one of `layers`.

    Args:
        case: Models and facts, with retain facts; the directions are estimated from all of them.
        layers: Layers in which the direction is removed singly; by default the middle layer and the last one.
        alphas: Factors of the subtracted direction; an empty sequence for no steering.
        folds: Number of folds of the groups.
        random: Number of random directions for comparison, in the table `random`: a change of the same size at every
            position, in a random direction, in all layers.
        limit: Use at most this many facts.

    Returns:
        The result of the test `own_direction`.

    Raises:
        InputError: There are no retain facts, fewer groups than folds, or a layer does not exist.
    """
    if case.retain is None:
        raise InputError(
            "own_direction needs retain prompts: the direction is the difference from their states. Give `retain`"
        )
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
    attack = _Attack(
        test="own_direction",
        level=3,
        estimate=estimate,
        variants=variants,
        alphas=alphas,
        folds=folds,
        random=random,
        proves=(
            "rho > 0: answers come back when the model's own direction of forget questions is removed from its "
            "states, so the model holds the answers behind that direction. rho = 0: no single direction of this "
            "kind hides them."
        ),
    )
    return _run(case, attack, limit)


def oracle_direction(
    case: Case, *, layers: Sequence[int] | None = None, folds: int = 2, random: int = 1, limit: int = 40
) -> StressResult:
    """Remove the direction in which unlearning moved the states of forget questions away from the base.

    The control is attacked with its own distance from the base.

    Args:
        case: Models and facts.
        layers: Layers in which the direction is removed singly; by default the middle layer and the last one.
        folds: Number of folds of the groups.
        random: Number of random directions for comparison, as in `own_direction`.
        limit: Use at most this many facts.

    Returns:
        The result of the test `oracle_direction`.

    Raises:
        InputError: There are fewer groups than folds, or a layer does not exist.
    """
    known: dict[str, Float[Tensor, "layer fact d_model"]] = {}

    def estimate(model: Model, fold: Int[np.ndarray, " fact"]) -> Directions:
        if not known:
            known["base"] = last_states(case.pair.base, case.forget.prompts, case.batch_size)
        moved = last_states(model, case.forget.prompts, case.batch_size) - known["base"]
        return torch.stack([moved[:, fold != number].mean(1) for number in range(folds)])

    n_layers = case.pair.n_layers
    chosen = (n_layers // 2, n_layers - 1) if layers is None else tuple(layers)
    attack = _Attack(
        test="oracle_direction",
        level=2,
        estimate=estimate,
        variants=_ablations(n_layers, chosen),
        alphas=(),
        folds=folds,
        random=random,
        proves=(
            "rho > 0: answers come back when the mean shift away from the base is removed, so the machinery that "
            "reads them survives; the base showed which direction to remove. rho = 0: no single direction of this "
            "kind hides them."
        ),
    )
    return _run(case, attack, limit)


def _ablations(n_layers: int, layers: Sequence[int]) -> dict[str, _Variant]:
    """Return the variants that remove the direction, in all layers and in each of `layers`.

    Raises:
        InputError: A layer does not exist.
    """
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise InputError(f"`layers` must be from 0 to {n_layers - 1}, got {layer}")
    singly = {f"removed at layer {layer}": _Variant((layer,)) for layer in layers}
    return {"removed in all layers": _Variant(tuple(range(n_layers)))} | singly


def _run(case: Case, attack: _Attack, limit: int) -> StressResult:
    """Run every variant of an attack on every model.

    Args:
        case: Models and facts.
        attack: Description of the test.
        limit: Use at most this many facts.

    Returns:
        The test's result.

    Returns:
        The scores of every model under every variant.

    Raises:
        InputError: There are fewer groups than folds, or the number of random directions is negative.
    """
    clock = time.monotonic()
    check_at_least("random", attack.random, 0)
    fold = dealt(case.forget.groups, attack.folds, seed=case.seed)
    facts = spread(case.forget, limit)
    indices = {id(item): index for index, item in enumerate(case.forget.prompts.items)}
    tested = [indices[id(item)] for item in facts.prompts.items]
    rows, controls = [], []
    with Progress(
        len(case.models) * (len(attack.variants) + attack.random + 1), attack.test, show=case.progress
    ) as bar:
        for role, model in case.models.items():
            directions = attack.estimate(model, fold)
            scorer = _Scorer(model, facts, fold[tested], directions, case.batch_size)
            rows.append((role, PLAIN, scorer.plain()))
            bar.advance(1)
            for name, variant in attack.variants.items():
                rows.append((role, name, scorer(variant)))
                bar.advance(1)
            for draw in range(attack.random):
                scores = scorer(attack.variants["removed in all layers"], random=case.seed + draw)
                means = {name: float(np.nanmean(values)) for name, values in scores.columns().items()}
                controls.append({"role": role, "variant": "removed in all layers", "draw": draw} | means)
                bar.advance(1)
    return StressResult(
        test=attack.test,
        level=attack.level,
        measure="rank",
        frame=fact_rows(facts, rows),
        proves=attack.proves,
        settings={
            "layers": [list(variant.layers) for variant in attack.variants.values()],
            "alphas": list(attack.alphas),
            "folds": attack.folds,
            "random": attack.random,
            "n_facts": len(facts),
            "seed": case.seed,
        },
        seconds=time.monotonic() - clock,
        seed=case.seed,
        tables={"random": pd.DataFrame(controls, columns=["role", "variant", "draw", *MEASURES])},
    )


def dealt(groups: Sequence[str], folds: int, *, seed: int) -> Int[np.ndarray, " fact"]:
    """Return the fold of each fact: whole groups (facts, if there are no groups), in an order drawn with the seed.

    Args:
        groups: Group of each fact.
        folds: Number of folds.
        seed: Random seed of the order.

    Returns:
        The number of each fact's fold.

    Raises:
        InputError: There are fewer than two folds, or fewer groups than folds.
    """
    cluster = clusters(groups)
    n = int(cluster.max()) + 1
    if not 2 <= folds <= n:
        raise InputError(f"`folds` must be from 2 to {n}, the number of groups of facts, got {folds}")
    return np.asarray(np.random.default_rng(seed).permutation(n)[cluster] % folds)


def last_states(model: Model, prompts: Prompts, batch_size: int) -> Float[Tensor, "layer fact d_model"]:
    """Return every block's output at each question's last token; answers are not read.

    Args:
        model: The model.
        prompts: The questions.
        batch_size: Maximum number of texts in one batch; no number depends on it.

    Returns:
        The states, on the CPU.
    """
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
    """Scores a model's facts, each fold with its own directions changed."""

    def __init__(
        self, model: Model, facts: Facts, fold: Int[np.ndarray, " fact"], directions: Directions, batch_size: int
    ) -> None:
        self._model, self._batch_size, self._directions = model, batch_size, directions
        self._n = len(facts)
        self._places = {int(number): np.flatnonzero(fold == number) for number in np.unique(fold)}
        self._facts = {number: facts.select(indices.tolist()) for number, indices in self._places.items()}

    def plain(self) -> FactScores:
        """Return the scores of the model without attack."""
        return self._together(lambda facts, _number: score_facts(self._model, facts, batch_size=self._batch_size))

    def __call__(self, variant: _Variant, random: int | None = None) -> FactScores:
        """Return the scores under a variant; with a seed, in random directions."""

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
    """Return the change of states that removes or subtracts a direction.

    Args:
        direction: The direction, of any length; a zero direction changes nothing.
        alpha: Factor of the subtracted direction; None to remove the states' component along it.
        random: Seed of a random direction along which a component of the same size is subtracted instead.

    Returns:
        A function from states to changed states.
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

    def remove(states: Float[Tensor, "*position d_model"]) -> Float[Tensor, "*position d_model"]:
        return states - (states @ unit.to(states))[..., None] * taken.to(states)

    return remove
