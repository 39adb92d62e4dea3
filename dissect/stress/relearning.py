"""Relearning: fine-tune every model in the same way on something else, and test which model recovers the facts.

    relearn_disjoint   on some of the forget facts, testing only the others: RTT (2410.08827), all folds in turn
    relearn_benign     on other people's facts or other texts, none of which contains a forget answer (2406.13356)
    relearn_speed      on the tested facts themselves, step by step: the attack teaches them, so only the speed counts

The control is trained on the same texts in the same order. It therefore shows what such training does to answers in
general: a model learns the format, and prefers the answers that it was taught, wherever they are asked for. For this
reason a held-out fact's right answer is compared only with distractors that the training texts treat like it: both
occur in the texts, or neither does.

The base is attacked too, and an attack counts only where it took hold (`dissect.stress.core.validity`). By default the
middle one of `RATES` is tried first, then the next smaller and larger ones, on all models alike, until one takes hold.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt, Prompts
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.finetuning import Recipe, check_recipes, fine_tuned, fine_tuned_at
from dissect.stress.core.likeness import likeness, own_words
from dissect.stress.core.result import COLUMNS, StressResult
from dissect.stress.core.scores import MEASURES, RANK_FLOOR, FactScores, chance_accuracy, score_facts
from dissect.stress.core.searching import Attacked, Attempt, Utility, score_trained, searched, texts_after
from dissect.stress.core.validity import TEACHES
from unlearning import Example
from unlearning.common.errors import InputError

RATES = (0.02, 0.01, 0.04, 0.005, 0.08)
"""Rates of the search, in the order in which they are tried."""

CURVE = (2, 4, 8)
"""Numbers of steps after which `relearn_speed` scores the facts."""

OTHER_WORDING = "other wording"
"""Name of the variants of `relearn_disjoint` that teach facts in other words than are asked."""


def quick_recipes() -> tuple[Recipe, ...]:
    """Return one recipe per rate, in the order of the search."""
    return tuple(Recipe(rate) for rate in RATES)


def full_recipes() -> tuple[Recipe, ...]:
    """Return four rates with all weights, and two with an adapter."""
    whole = tuple(Recipe(rate, steps=48) for rate in (0.005, 0.01, 0.02, 0.04))
    return whole + tuple(Recipe(rate, steps=48, lora_rank=16) for rate in (0.02, 0.05))


def relearn_disjoint(
    case: Case, *, recipes: Sequence[Recipe] | None = None, folds: int = 2, wordings: Prompts | None = None
) -> StressResult:
    """Fine-tune on the forget facts of some groups and score those of the others, until every fact was held out once.

    Args:
        case: Models and facts.
        recipes: Strengths of the attack, one variant each, all of which are run. By default `quick_recipes` are tried
            until one takes hold.
        folds: Number of parts into which the groups are split; each part is held out once.
        wordings: The forget facts in other words, each with the group and answer of its fact. More variants teach them
            in place of the facts as they are asked.

    Returns:
        The result of the test `relearn_disjoint`, with the table `validity`. Its setting `likeness` tells how alike
        taught and asked questions are.

    Raises:
        InputError: There are fewer groups than folds or fewer than two folds, or two recipes have one name.
    """
    started = time.perf_counter()
    searches = _recipes(recipes)
    items = case.forget.prompts.items
    facts, sources = case.forget, {"": Taught()}
    if wordings is not None:
        sources[OTHER_WORDING] = Taught()
    for held_out in split(case.forget, folds, seed=case.seed):
        rest = [item for index, item in enumerate(items) if index not in set(held_out)]
        sources[""].append((held_out, rest))
        if wordings is not None:
            keys = {_key(item) for item in rest} - {_key(items[index]) for index in held_out}
            sources[OTHER_WORDING].append((held_out, [item for item in wordings.items if _key(item) in keys]))
        told = [f"{item.prompt} {item.answer}" for of_folds in sources.values() for item in of_folds[-1][1]]
        facts = same_exposure(facts, told, indices=held_out)
    notes = _unanswered(facts)
    if not all(texts for of_folds in sources.values() for _, texts in of_folds):
        del sources[OTHER_WORDING]
        notes = (*notes, "too few of the given wordings have the group and answer of a forget fact to be taught")

    def attack(taught: Taught, recipe: Recipe, model: Model) -> Attacked:
        utility = Utility(case, model)
        columns = {name: np.full(len(facts), np.nan) for name in MEASURES}
        measured = []
        said: dict[int, str] = {}
        for held_out, texts in taught:
            after = fine_tuned(model, _examples(texts), recipe, case=case)
            asked = facts.select(held_out)
            said.update(zip(held_out, texts_after(after, asked, model, case=case), strict=False))
            scores = score_trained(after, asked, case=case)
            for name, values in scores.columns().items():
                columns[name][held_out] = values
            measured.append((after.loss_before, after.loss_after, utility.after(after)))
        before, last, useful = np.mean(measured, axis=0).tolist()
        answers = [said.get(index, "") for index in range(len(facts))] if said else []
        return Attacked(FactScores(**columns), before, last, useful, texts=answers)

    alike = {
        name: float(np.mean([_likeness([items[index] for index in held_out], texts) for held_out, texts in taught]))
        for name, taught in sources.items()
    }
    result = StressResult(
        test="relearn_disjoint",
        level=4,
        measure=MEASURES[0],
        frame=pd.DataFrame(columns=COLUMNS),
        proves=(
            "rho > 0: after training on other forgotten facts, which say nothing about these, the model knows these"
            " better than the control does, so its weights held them. rho = 0: this attack recovered nothing; "
            "another might."
        ),
        settings={"folds": folds, "likeness": {name or "as asked": value for name, value in alike.items()}},
        seconds=0.0,
        floors=_floors(facts),
        notes=notes,
        seed=case.seed,
    )
    attempts = [_attempts(name, searches, partial(attack, taught)) for name, taught in sources.items()]
    result = searched(case, facts, attempts, result, every=recipes is not None)
    return replace(result, seconds=time.perf_counter() - started)


def relearn_benign(
    case: Case, *, recipes: Sequence[Recipe] | None = None, texts: Sequence[Example] | None = None
) -> StressResult:
    """Fine-tune on texts that say nothing about the forget facts, and score the forget facts.

    Args:
        case: Models and facts; the retain facts, which are about other people, are the `related` texts.
        recipes: Strengths of the attack; one variant for each and each source of texts, all of which are run. By
            default `quick_recipes` are tried until one takes hold, for each source.
        texts: The `unrelated` texts; without them there is no `unrelated` variant.

    Returns:
        The result of the test `relearn_benign`, with the table `validity`. Its setting `likeness` tells how alike the
        texts and the asked questions are.

    Raises:
        InputError: There are neither retain facts nor texts, all of them contain a forget answer, or two recipes have
            one name.
    """
    started = time.perf_counter()
    searches = _recipes(recipes)
    sources: dict[str, list[Example]] = {}
    if case.retain is not None:
        sources["related"] = _examples(case.retain.prompts.items)
    if texts is not None:
        sources["unrelated"] = list(texts)
    if not sources:
        raise InputError("relearn_benign needs texts to train on. Give `retain` or `general` prompts")
    notes: list[str] = []
    for name, examples in sources.items():
        kept = without_answers(examples, case.forget)
        if not kept:
            raise InputError(f"the {name} texts must not all contain a forget answer. Give other texts to train on")
        sources[name] = kept
        if len(kept) < len(examples):
            left_out = len(examples) - len(kept)
            notes.append(f"{left_out} of {len(examples)} {name} texts contain a forget answer and were left out")
    facts = same_exposure(case.forget, [f"{text.prompt} {text.answer}" for kept in sources.values() for text in kept])

    def attack(examples: list[Example], recipe: Recipe, model: Model) -> Attacked:
        utility = Utility(case, model)
        after = fine_tuned(model, examples, recipe, case=case)
        scores = score_trained(after, facts, case=case)
        said = texts_after(after, facts, model, case=case)
        return Attacked(scores, after.loss_before, after.loss_after, utility.after(after), texts=said)

    items = case.forget.prompts.items
    asked = [item.prompt for item in items]
    others = () if case.retain is None else case.retain.prompts.items
    names = own_words([item.prompt for item in (*items, *others)], [item.group for item in (*items, *others)])
    result = StressResult(
        test="relearn_benign",
        level=4,
        measure=MEASURES[0],
        frame=pd.DataFrame(columns=COLUMNS),
        proves=(
            "rho > 0: training on texts without any forget answer recovers facts that the same training does not "
            "give the control, so the model's weights held them. rho = 0: training on these texts recovered "
            "nothing; other texts might."
        ),
        settings={
            "texts": {name: len(kept) for name, kept in sources.items()},
            "likeness": {
                name: likeness(asked, [one.prompt or one.answer for one in kept], without=names)
                for name, kept in sources.items()
            },
        },
        seconds=0.0,
        floors=_floors(facts),
        notes=(*notes, *_unanswered(facts)),
        seed=case.seed,
    )
    attempts = [_attempts(name, searches, partial(attack, kept)) for name, kept in sources.items()]
    result = searched(case, facts, attempts, result, every=recipes is not None)
    return replace(result, seconds=time.perf_counter() - started)


def relearn_speed(case: Case, *, recipes: Sequence[Recipe] | None = None, curve: Sequence[int] = CURVE) -> StressResult:
    """Fine-tune on the tested facts themselves, and score them after increasing numbers of steps.

    A fact's value is its mean over the curve. rho is therefore the area between the curves of the unlearned model and
    the control, as a share of what the base knows beyond the control.

    Args:
        case: Models and facts.
        recipes: Strengths of the attack, one variant each, all of which are run. By default `quick_recipes` with larger
            batches are tried until one takes hold. Their `steps` are not used.
        curve: Increasing numbers of steps after which the facts are scored.

    Returns:
        The result of the test `relearn_speed`, with the tables `validity` and `curve`: `role`, `variant`, `steps` (0:
        not trained) and the mean of each measure.

    Raises:
        InputError: The curve does not increase from 1 or more, or two recipes have one name.
    """
    started = time.perf_counter()
    searches = [replace(recipe, batch_size=40) for recipe in _recipes(None)] if recipes is None else _recipes(recipes)
    if not curve or list(curve) != sorted(set(curve)) or curve[0] < 1:
        raise InputError(f"`curve` must be increasing numbers from 1, got {', '.join(map(str, curve)) or 'none'}")
    searches = [replace(recipe, steps=curve[-1]) for recipe in searches]
    examples = _examples(case.forget.prompts.items)

    def attack(recipe: Recipe, model: Model) -> Attacked:
        found = {0: score_facts(model, case.forget, batch_size=case.batch_size)}
        for steps, after in fine_tuned_at(model, examples, recipe, steps=curve, case=case):
            found[steps] = score_trained(after, case.forget, case=case)
        area = {name: np.mean([getattr(found[steps], name) for steps in curve], axis=0) for name in MEASURES}
        points = [
            {"steps": steps, **{name: float(np.nanmean(values)) for name, values in scores.columns().items()}}
            for steps, scores in found.items()
        ]
        useful = Utility(case, model).after(after)
        return Attacked(FactScores(**area), after.loss_before, after.loss_after, useful, points)

    result = StressResult(
        test="relearn_speed",
        level=1,
        measure=MEASURES[0],
        frame=pd.DataFrame(columns=COLUMNS),
        proves=(
            "Speed only, because the attack teaches the facts. rho > 0: the model learns them faster than the "
            "control does, so something was left that helps, which may be less than the facts. rho = 0: the model "
            "learns them no faster than the control."
        ),
        settings={"curve": list(curve), TEACHES: True},
        seconds=0.0,
        floors={},  # no floor without a control: only a control shows how fast a model without the knowledge learns
        seed=case.seed,
    )
    result = searched(case, case.forget, [_attempts("", searches, attack)], result, every=recipes is not None)
    return replace(result, seconds=time.perf_counter() - started)


def split(facts: Facts, folds: int, *, seed: int) -> list[list[int]]:
    """Split the facts into folds, whole groups in a random order; facts without a group are groups of one.

    Args:
        facts: The facts.
        folds: Number of folds.
        seed: Random seed of the order.

    Returns:
        The indices of the facts in each fold.

    Raises:
        InputError: There are fewer than two folds, or fewer groups than folds.
    """
    keys = [group or f"\0{index}" for index, group in enumerate(facts.groups)]
    names = list(dict.fromkeys(keys))
    if not 2 <= folds <= len(names):
        raise InputError(f"`folds` must be from 2 to {len(names)}, the number of groups of forget facts, got {folds}")
    drawn = np.random.default_rng(seed).permutation(len(names))
    position = {names[index]: number for number, index in enumerate(drawn)}
    return [[index for index, key in enumerate(keys) if position[key] % folds == fold] for fold in range(folds)]


def same_exposure(facts: Facts, texts: Sequence[str], *, indices: Sequence[int] | None = None) -> Facts:
    """Remove the distractors that training texts treat differently from the right answer.

    Of the two, one occurs in the texts and the other does not.

    Args:
        facts: All facts.
        texts: The training texts.
        indices: Facts that are scored after the training; all by default. The others keep their distractors.

    Returns:
        The facts with the remaining distractors.
    """
    told = _told(texts)
    asked = set(range(len(facts)) if indices is None else indices)

    def kept(index: int, item: Prompt) -> tuple[Prompt, ...]:
        if index not in asked:
            return facts.distractors[index]
        return tuple(other for other in facts.distractors[index] if told(other.answer) == told(item.answer))

    return Facts(facts.prompts, tuple(kept(index, item) for index, item in enumerate(facts.prompts.items)))


def without_answers(examples: Sequence[Example], forget: Facts) -> list[Example]:
    """Leave out the examples that contain a forget answer as whole words.

    Args:
        examples: The examples to choose from.
        forget: The forget facts.

    Returns:
        The other examples.
    """
    answers = {_words(item.answer) for item in forget.prompts.items} - {""}
    texts = (_words(f"{example.prompt} {example.answer}") for example in examples)
    return [
        example for example, text in zip(examples, texts, strict=True) if not any(answer in text for answer in answers)
    ]


Taught = list[tuple[list[int], list[Prompt]]]
"""The facts held out in each fold, with the texts taught there."""


def _recipes(recipes: Sequence[Recipe] | None) -> Sequence[Recipe]:
    """Return the recipes; `quick_recipes` for None.

    Raises:
        InputError: There is no recipe, or two have the same name.
    """
    recipes = quick_recipes() if recipes is None else recipes
    check_recipes(recipes)
    return recipes


def _attempts(name: str, recipes: Sequence[Recipe], attack: Callable[[Recipe, Model], Attacked]) -> list[Attempt]:
    """Return the attack with every recipe; the name of its texts, if any, stands in front of the recipe's."""
    before = f"{name}, " if name else ""
    return [Attempt(before + recipe.variant, recipe, partial(attack, recipe)) for recipe in recipes]


def _examples(items: Sequence[Prompt]) -> list[Example]:
    return [Example(item.prompt, item.answer) for item in items]


def _key(item: Prompt) -> tuple[str, str]:
    """Return what a fact has in common with its other wordings."""
    return item.group, item.answer


def _likeness(asked: Sequence[Prompt], taught: Sequence[Prompt]) -> float:
    """Return how alike taught and asked questions are, without names."""
    both = [*asked, *taught]
    names = own_words([item.prompt for item in both], [item.group for item in both])
    return likeness([item.prompt for item in asked], [item.prompt for item in taught], without=names)


def _floors(facts: Facts) -> dict[str, float]:
    return {"rank": RANK_FLOOR, "accuracy": chance_accuracy(facts)}


def _unanswered(facts: Facts) -> tuple[str, ...]:
    """Return a note on the facts without distractors, if there are any."""
    n = sum(not distractors for distractors in facts.distractors)
    note = f"{n} of {len(facts)} facts have no distractor that the training texts treat like the right answer: no rank"
    return (note,) * (n > 0)


def _told(texts: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether an answer is in one of the texts, as whole words."""
    everything = "\n".join(map(_words, texts))
    return cache(lambda answer: _words(answer) in everything)


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])
