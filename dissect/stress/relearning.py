"""Relearning: fine-tune every model alike on something else, and see whose facts come back.

    relearn_disjoint   on some of the forget facts, asking only the others: RTT (2410.08827), all folds in turn
    relearn_benign     on other people's facts or other texts, none with a forget answer in it (2406.13356)
    relearn_speed      on the very facts, step by step: what comes back is put in, only the speed counts

The never model is trained on the same texts in the same order. What training does to answers in general it does to it
as well: it learns the format, and prefers the answers that it was taught, wherever they are asked for. So a held-out
fact's right answer is compared only with wrong answers that the training texts treat as it: all in them, or all not.
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
"""Steps after which `relearn_speed` asks."""


@dataclass(frozen=True)
class Recipe:
    """One strength of the attack.

    Attributes:
        learning_rate: of AdamW, constant.
        steps: of the optimizer.
        batch_size: texts in a step.
        lora_rank: of an adapter that is trained in place of the weights; 0 for none.
    """

    learning_rate: float
    steps: int = 24
    batch_size: int = 20
    lora_rank: int = 0

    @property
    def variant(self) -> str:
        """Its name in tables."""
        return f"lr {self.learning_rate:.2g}" + (f", lora {self.lora_rank}" if self.lora_rank else "")


def quick_recipes(model: Model) -> tuple[Recipe, ...]:
    """The one that recovered most from the built-in unlearned models, scaled by the width of this one."""
    return (Recipe(RATE / model.adapter.cfg.d_model),)


def full_recipes(model: Model) -> tuple[Recipe, ...]:
    """Four learning rates with all weights, and two with an adapter."""
    rate = RATE / model.adapter.cfg.d_model
    whole = tuple(Recipe(rate * factor, steps=48) for factor in (0.1, 0.3, 1, 3))
    return whole + tuple(Recipe(rate * factor, steps=48, lora_rank=16) for factor in (3, 10))


def relearn_disjoint(case: Case, *, recipes: Sequence[Recipe] | None = None, folds: int = 2) -> StressResult:
    """Fine-tune on the forget facts of some groups and ask those of the others, until every fact was asked once.

    Args:
        case: models and facts.
        recipes: `quick_recipes` by default; one variant each.
        folds: how many parts the groups are dealt into; each is held out once.

    Raises:
        InputError: fewer groups than folds, fewer than two folds, or training that diverges.
    """
    started = time.perf_counter()
    recipes = _checked(recipes, case)
    parts = split(case.forget, folds, seed=case.seed)
    everything = range(len(case.forget))
    facts, taught = case.forget, {}
    for held_out in parts:
        rest = [case.forget.prompts.items[place] for place in sorted(set(everything) - set(held_out))]
        taught[tuple(held_out)] = [Example(item.prompt, item.answer) for item in rest]
        facts = same_exposure(facts, [f"{item.prompt} {item.answer}" for item in rest], places=held_out)

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
            "Above zero: after training on other forgotten facts, which say nothing of these, the model knows these "
            "better than a model that never did: its weights held them. "
            "Zero: this attack found none; another might."
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
    """Fine-tune on what tells nothing of the forget facts, and ask them.

    Args:
        case: models and facts; the retain facts, questions about others, are the `related` texts.
        recipes: `quick_recipes` by default; with each source of texts a variant each.
        texts: the `unrelated` ones; no `unrelated` variant without them.

    Raises:
        InputError: neither retain facts nor texts, none without a forget answer, or training that diverges.
    """
    started = time.perf_counter()
    recipes = _checked(recipes, case)
    sources: dict[str, list[Example]] = {}
    if case.retain is not None:
        sources["related"] = [Example(item.prompt, item.answer) for item in case.retain.prompts.items]
    if texts is not None:
        sources["unrelated"] = list(texts)
    if not sources:
        raise InputError("benign relearning trains on retain prompts or other texts; give one of them")
    notes: list[str] = []
    for name, examples in sources.items():
        kept = without_answers(examples, case.forget)
        if not kept:
            raise InputError(f"every one of the {name} texts has a forget answer in it; give others to train on")
        sources[name] = kept
        if len(kept) < len(examples):
            notes.append(f"{len(examples) - len(kept)} of {len(examples)} {name} texts left out: a forget answer in it")
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
            "Above zero: training on texts without any forgotten answer brought facts back that a model that never "
            "knew them does not gain: its weights held them. Zero: these texts did not; others might."
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
    """Fine-tune on the very facts, and ask them after ever more steps: how much sooner than in a never model?

    A fact's value is its mean over the curve, so that rho is the area between the curves of the unlearned and the
    never model, as a share of what the base knows more than the never model.

    Args:
        case: models and facts.
        recipes: `quick_recipes` by default, with larger batches; one variant each. Their `steps` are not used.
        curve: steps after which the facts are asked, in rising order.

    Returns:
        With the table `curve`: `role`, `variant`, `steps` (0: not trained) and the mean of each measure.

    Raises:
        InputError: a curve that does not rise from 1 or more, or training that diverges.
    """
    started = time.perf_counter()
    if recipes is None:
        recipes = [replace(recipe, batch_size=40) for recipe in quick_recipes(case.pair.base)]
    recipes = _checked(recipes, case)
    if not curve or list(curve) != sorted(set(curve)) or curve[0] < 1:
        raise InputError(f"steps {', '.join(map(str, curve)) or 'of no number'}: give rising numbers from 1 on")
    examples = [Example(item.prompt, item.answer) for item in case.forget.prompts.items]
    scored: list[tuple[str, str, FactScores]] = []
    points = []
    for role, model in case.models.items():
        plain = score_facts(model, case.forget, batch_size=case.batch_size)
        scored.append((role, PLAIN, plain))
        for recipe in recipes:
            found = {0: plain}
            for steps in curve:
                # From the start each time, which costs no more than twice as much where steps double: the trainer
                # has no place to ask on the way, and a constant rate makes shorter runs beginnings of longer ones.
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
            "Speed only: the attack teaches the facts. Above zero: they are learnt sooner than by a model that never "
            "knew them, so something was left to learn them from; it may be less than the facts. "
            "Zero: nothing speeds them up."
        ),
        settings={"curve": list(curve), "recipes": [asdict(recipe) for recipe in recipes]},
        seconds=time.perf_counter() - started,
        floors={},  # how fast a model learns that never knew, only such a model tells
        seed=case.seed,
        tables={"curve": pd.DataFrame(points)},
    )


def split(facts: Facts, folds: int, *, seed: int) -> list[list[int]]:
    """Deal the facts into folds, group by group in a random order; facts without a group are groups of their own.

    Raises:
        InputError: fewer than two folds, or fewer groups than folds.
    """
    keys = [group or f"\0{place}" for place, group in enumerate(facts.groups)]
    names = list(dict.fromkeys(keys))
    if not 2 <= folds <= len(names):
        raise InputError(f"{folds} folds of {len(names)} groups of forget facts: give from 2 to {len(names)}")
    turn = {names[place]: number for number, place in enumerate(np.random.default_rng(seed).permutation(len(names)))}
    return [[place for place, key in enumerate(keys) if turn[key] % folds == fold] for fold in range(folds)]


def same_exposure(facts: Facts, texts: Sequence[str], *, places: Sequence[int] | None = None) -> Facts:
    """The facts without the wrong answers that the texts treat otherwise than the right one: one in them, one not.

    Args:
        facts: all of them.
        texts: what a model is trained on.
        places: of the facts that are asked after it; all by default. The others keep theirs.
    """
    told = _told(texts)
    asked = set(range(len(facts)) if places is None else places)

    def kept(place: int, item: Prompt) -> tuple[Prompt, ...]:
        if place not in asked:
            return facts.distractors[place]
        return tuple(other for other in facts.distractors[place] if told(other.answer) == told(item.answer))

    return Facts(facts.prompts, tuple(kept(place, item) for place, item in enumerate(facts.prompts.items)))


def without_answers(examples: Sequence[Example], forget: Facts) -> list[Example]:
    """The examples that have no forget answer in them, as whole words."""
    answers = {_words(item.answer) for item in forget.prompts.items} - {""}
    texts = (_words(f"{example.prompt} {example.answer}") for example in examples)
    return [
        example for example, text in zip(examples, texts, strict=True) if not any(answer in text for answer in answers)
    ]


def fine_tuned(model: Model, examples: Sequence[Example], recipe: Recipe, *, case: Case) -> Model:
    """A copy of the model after plain fine-tuning on answers, in float32; the order of the examples is the case's.

    Raises:
        InputError: what `unlearning.train` raises.
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
    recipes = quick_recipes(case.pair.base) if recipes is None else recipes
    if not recipes or len({recipe.variant for recipe in recipes}) < len(recipes):
        raise InputError("relearning takes at least one recipe, each of another learning rate or adapter")
    return recipes


def _rows(case: Case, facts: Facts, variants: Mapping[str, Callable[[Model], FactScores]]) -> pd.DataFrame:
    """Every model as it is, and attacked all but the base, whose attacked rows no residual reads."""
    scored: list[tuple[str, str, FactScores]] = []
    for role, model in case.models.items():
        scored.append((role, PLAIN, score_facts(model, facts, batch_size=case.batch_size)))
        if role != "base":
            scored += [(role, variant, attacked(model)) for variant, attacked in variants.items()]
    return fact_rows(facts, scored)


def _floors(facts: Facts) -> dict[str, float]:
    return {"rank": RANK_FLOOR, "accuracy": chance_accuracy(facts)}


def _unanswered(facts: Facts) -> tuple[str, ...]:
    n = sum(not wrong for wrong in facts.distractors)
    return (f"{n} of {len(facts)} facts have no wrong answer that training treats as the right one: no rank",) * (n > 0)


def _told(texts: Sequence[str]) -> Callable[[str], bool]:
    """Whether an answer stands in one of the texts, as whole words."""
    everything = "\n".join(map(_words, texts))
    return cache(lambda answer: _words(answer) in everything)


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def _of_a_chat(case: Case) -> bool:
    """Whether the prompts were wrapped by a chat template, which brings its own special tokens."""
    item = case.forget.prompts.items[0]
    return encode_answer(case.pair.tokenizer, item.prompt, item.answer).input_ids != list(item.input_ids)


@contextmanager
def _few_collections() -> Iterator[None]:
    """The trainer collects garbage when it ends, which takes longer than a short run of a small model where there are
    many objects: those that are there already are left out of it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
