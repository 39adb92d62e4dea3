"""Relearning: fine-tune every model in the same way on something else, and test which model recovers the facts.

    relearn_disjoint   on some of the forget facts, testing only the others: RTT (2410.08827), all folds in turn
    relearn_benign     on other people's facts or other texts, none of which contains a forget answer (2406.13356)
    relearn_speed      on the tested facts themselves, step by step: the attack teaches them, so only the speed counts

The control is trained on the same texts in the same order. It therefore shows what such training does to answers in
general: a model learns the format, and prefers the answers that it was taught, wherever they are asked for. For this
reason a held-out fact's right answer is compared only with distractors that the training texts treat like it: both
occur in the texts, or neither does.
"""

import copy
import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
import pandas as pd

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, RANK_FLOOR, FactScores, chance_accuracy, score_facts
from unlearning import Example, train
from unlearning.common.errors import InputError
from unlearning.data.spans import encode_answer

RATE = 0.128
"""Learning rate times the model's width: 1e-3 for a width of 128, 6e-5 for 2048."""

CURVE = (2, 4, 8)
"""Numbers of steps after which `relearn_speed` scores the facts."""


@dataclass(frozen=True)
class Recipe:
    """One strength of the attack.

    Attributes:
        learning_rate: Constant learning rate of AdamW.
        steps: Number of optimizer steps.
        batch_size: Number of texts per step.
        lora_rank: Rank of an adapter that is trained instead of the weights; 0 trains the weights.
    """

    learning_rate: float
    steps: int = 24
    batch_size: int = 20
    lora_rank: int = 0

    @property
    def variant(self) -> str:
        """Name of the recipe in tables."""
        return f"lr {self.learning_rate:.2g}" + (f", lora {self.lora_rank}" if self.lora_rank else "")


def quick_recipes(model: Model) -> tuple[Recipe, ...]:
    """Return the one recipe that recovered most from the built-in unlearned models, scaled by this model's width."""
    return (Recipe(RATE / model.adapter.cfg.d_model),)


def full_recipes(model: Model) -> tuple[Recipe, ...]:
    """Return four learning rates with all weights, and two with an adapter."""
    rate = RATE / model.adapter.cfg.d_model
    whole = tuple(Recipe(rate * factor, steps=48) for factor in (0.1, 0.3, 1, 3))
    return whole + tuple(Recipe(rate * factor, steps=48, lora_rank=16) for factor in (3, 10))


def relearn_disjoint(case: Case, *, recipes: Sequence[Recipe] | None = None, folds: int = 2) -> StressResult:
    """Fine-tune on the forget facts of some groups and score those of the others, until every fact was held out once.

    Args:
        case: Models and facts.
        recipes: Strengths of the attack, one variant each; `quick_recipes` by default.
        folds: Number of parts into which the groups are split; each part is held out once.

    Returns:
        The result of the test `relearn_disjoint`.

    Raises:
        InputError: There are fewer groups than folds or fewer than two folds, or training diverges.
    """
    started = time.perf_counter()
    recipes = _checked(recipes, case)
    parts = split(case.forget, folds, seed=case.seed)
    everything = range(len(case.forget))
    facts, taught = case.forget, {}
    for held_out in parts:
        rest = [case.forget.prompts.items[index] for index in sorted(set(everything) - set(held_out))]
        taught[tuple(held_out)] = [Example(item.prompt, item.answer) for item in rest]
        facts = same_exposure(facts, [f"{item.prompt} {item.answer}" for item in rest], indices=held_out)

    def attacked(recipe: Recipe, model: Model) -> FactScores:
        columns = {name: np.full(len(facts), np.nan) for name in MEASURES}
        for held_out, examples in taught.items():
            after = fine_tuned(model, examples, recipe, case=case)
            scores = score_facts(after, facts.select(held_out), batch_size=case.batch_size)
            for name, values in scores.columns().items():
                columns[name][list(held_out)] = values
        return FactScores(**columns)

    return StressResult(
        test="relearn_disjoint",
        level=4,
        measure=MEASURES[0],
        frame=_rows(case, facts, {recipe.variant: partial(attacked, recipe) for recipe in recipes}),
        proves=(
            "rho > 0: after training on other forgotten facts, which say nothing about these, the model knows these"
            " better than the control does, so its weights held them. rho = 0: this attack recovered nothing; "
            "another might."
        ),
        settings={"folds": folds, "recipes": [asdict(recipe) for recipe in recipes]},
        seconds=time.perf_counter() - started,
        floors=_floors(facts),
        notes=_unanswered(facts),
        seed=case.seed,
    )


def relearn_benign(
    case: Case, *, recipes: Sequence[Recipe] | None = None, texts: Sequence[Example] | None = None
) -> StressResult:
    """Fine-tune on texts that say nothing about the forget facts, and score the forget facts.

    Args:
        case: Models and facts; the retain facts, which are about other people, are the `related` texts.
        recipes: Strengths of the attack; one variant for each and each source of texts. `quick_recipes` by default.
        texts: The `unrelated` texts; without them there is no `unrelated` variant.

    Returns:
        The result of the test `relearn_benign`.

    Raises:
        InputError: There are neither retain facts nor texts, all of them contain a forget answer, or training diverges.
    """
    started = time.perf_counter()
    recipes = _checked(recipes, case)
    sources: dict[str, list[Example]] = {}
    if case.retain is not None:
        sources["related"] = [Example(item.prompt, item.answer) for item in case.retain.prompts.items]
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

    def attacked(examples: list[Example], recipe: Recipe, model: Model) -> FactScores:
        after = fine_tuned(model, examples, recipe, case=case)
        return score_facts(after, facts, batch_size=case.batch_size)

    variants = {
        f"{name}, {recipe.variant}": partial(attacked, kept, recipe)
        for name, kept in sources.items()
        for recipe in recipes
    }
    return StressResult(
        test="relearn_benign",
        level=4,
        measure=MEASURES[0],
        frame=_rows(case, facts, variants),
        proves=(
            "rho > 0: training on texts without any forget answer recovers facts that the same training does not "
            "give the control, so the model's weights held them. rho = 0: training on these texts recovered "
            "nothing; other texts might."
        ),
        settings={
            "texts": {name: len(kept) for name, kept in sources.items()},
            "recipes": [asdict(recipe) for recipe in recipes],
        },
        seconds=time.perf_counter() - started,
        floors=_floors(facts),
        notes=(*notes, *_unanswered(facts)),
        seed=case.seed,
    )


def relearn_speed(case: Case, *, recipes: Sequence[Recipe] | None = None, curve: Sequence[int] = CURVE) -> StressResult:
    """Fine-tune on the tested facts themselves, and score them after increasing numbers of steps.

    A fact's value is its mean over the curve. rho is therefore the area between the curves of the unlearned model and
    the control, as a share of what the base knows beyond the control.

    Args:
        case: Models and facts.
        recipes: Strengths of the attack, one variant each; `quick_recipes` with larger batches by default. Their
            `steps` are not used.
        curve: Increasing numbers of steps after which the facts are scored.

    Returns:
        The result of the test `relearn_speed`, with the table `curve`: `role`, `variant`, `steps` (0: not trained) and
        the mean of each measure.

    Raises:
        InputError: The curve does not increase from 1 or more, or training diverges.
    """
    started = time.perf_counter()
    if recipes is None:
        recipes = [replace(recipe, batch_size=40) for recipe in quick_recipes(case.pair.base)]
    recipes = _checked(recipes, case)
    if not curve or list(curve) != sorted(set(curve)) or curve[0] < 1:
        raise InputError(f"`curve` must be increasing numbers from 1, got {', '.join(map(str, curve)) or 'none'}")
    examples = [Example(item.prompt, item.answer) for item in case.forget.prompts.items]
    scored: list[tuple[str, str, FactScores]] = []
    points = []
    for role, model in case.models.items():
        plain = score_facts(model, case.forget, batch_size=case.batch_size)
        scored.append((role, PLAIN, plain))
        for recipe in recipes:
            found = {0: plain}
            for steps in curve:
                # Every number of steps is trained from the start, because the trainer cannot score facts on the
                # way. If steps double, this costs at most twice as much. With a constant learning rate, a shorter
                # run is the beginning of a longer one.
                after = fine_tuned(model, examples, replace(recipe, steps=steps), case=case)
                found[steps] = score_facts(after, case.forget, batch_size=case.batch_size)
            of_curve = [found[steps].columns() for steps in curve]
            area = {name: np.mean([columns[name] for columns in of_curve], axis=0) for name in MEASURES}
            scored.append((role, recipe.variant, FactScores(**area)))
            for steps, scores in found.items():
                means = {name: float(np.nanmean(values)) for name, values in scores.columns().items()}
                points.append({"role": role, "variant": recipe.variant, "steps": steps, **means})
    return StressResult(
        test="relearn_speed",
        level=1,
        measure=MEASURES[0],
        frame=fact_rows(case.forget, scored),
        proves=(
            "Speed only, because the attack teaches the facts. rho > 0: the model learns them faster than the "
            "control does, so something was left that helps, which may be less than the facts. rho = 0: the model "
            "learns them no faster than the control."
        ),
        settings={"curve": list(curve), "recipes": [asdict(recipe) for recipe in recipes]},
        seconds=time.perf_counter() - started,
        floors={},  # no floor without a control: only a control shows how fast a model without the knowledge learns
        seed=case.seed,
        tables={"curve": pd.DataFrame(points)},
    )


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


def fine_tuned(model: Model, examples: Sequence[Example], recipe: Recipe, *, case: Case) -> Model:
    """Return a copy of the model after plain fine-tuning on answers, in float32.

    Args:
        model: The model; it is not changed.
        examples: Questions and answers to train on; their order is drawn with the case's seed.
        recipe: Strength of the attack.
        case: Models and facts; gives tokenizer, seed and chat template.

    Returns:
        The fine-tuned model.

    Raises:
        InputError: `unlearning.train` raises it.
    """
    tokenizer = case.pair.tokenizer
    with _few_collections():
        trained = train(
            "finetune",
            model=copy.deepcopy(model.hf),
            tokenizer=tokenizer,
            retain=list(examples),
            progress=False,
            learning_rate=recipe.learning_rate,
            max_steps=recipe.steps,
            batch_size=recipe.batch_size,
            gradient_accumulation_steps=1,
            lr_schedule="constant",
            warmup_ratio=0.0,
            lora_rank=recipe.lora_rank,
            lora_alpha=max(1, recipe.lora_rank),
            seed=case.seed,
            chat=_of_a_chat(case),
            append_eos=tokenizer.eos_token_id is not None,
            device="cpu" if model.device.type == "cpu" else "auto",
            eval_examples=1,
        ).model
    return replace(model, hf=trained.to(model.device), sha256=f"{model.sha256} fine-tuned")  # type: ignore[arg-type]


def _checked(recipes: Sequence[Recipe] | None, case: Case) -> Sequence[Recipe]:
    """Return the recipes; `quick_recipes` for None.

    Raises:
        InputError: There is no recipe, or two have the same name.
    """
    recipes = quick_recipes(case.pair.base) if recipes is None else recipes
    if not recipes or len({recipe.variant for recipe in recipes}) < len(recipes):
        raise InputError("`recipes` must not be empty, and each must have another learning rate or adapter")
    return recipes


def _rows(case: Case, facts: Facts, variants: Mapping[str, Callable[[Model], FactScores]]) -> pd.DataFrame:
    """Score every model without attack, and every model but the base under attack."""
    scored: list[tuple[str, str, FactScores]] = []
    for role, model in case.models.items():
        scored.append((role, PLAIN, score_facts(model, facts, batch_size=case.batch_size)))
        if role != "base":
            scored += [(role, variant, attacked(model)) for variant, attacked in variants.items()]
    return fact_rows(facts, scored)


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


def _of_a_chat(case: Case) -> bool:
    """Return whether the prompts were wrapped by a chat template, which adds its own special tokens."""
    item = case.forget.prompts.items[0]
    return encode_answer(case.pair.tokenizer, item.prompt, item.answer).input_ids != list(item.input_ids)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Keep existing objects out of garbage collection.

    The trainer collects garbage when it ends. With many objects in memory, that takes longer than a short run of a
    small model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
