"""Build the built-in models from nothing; `python -m dissect.zoo.build` is its command line.

For each family: a tokenizer, a trunk pretrained on the general set and the trunk people's facts, then

- base: the trunk fine-tuned on everybody's facts;
- never: the trunk fine-tuned for as many steps on the same retain facts, with texts of the general set in the
  place of the forget people's;
- each unlearning method's: the shipped base, unlearned on the forget questions (Who's Harry Potter, which reads text:
  on the statements too), with a retain term.

One thread and seeded orders: the same bytes on the same machine. A model is written beside its place and then
renamed, so a build that was stopped goes on after the last finished model.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dissect.zoo import DIRECTORY, QUESTIONS
from dissect.zoo.card import Seconds, measure, write_card
from dissect.zoo.recipes import RECIPES, Fitting, Recipe, new_model
from dissect.zoo.tokenizer import train_tokenizer
from dissect.zoo.world import World, anchors, general_texts, generate_world, person_texts, write_records
from unlearning import Example, InputError, train
from unlearning.checkpoints.load import load_weights
from unlearning.data.spans import join_answer
from unlearning.methods.whp.anchors import write_anchors

RECORD = "build.json"
ANCHORS = "anchors.json"
THREADS = 1
"""Sums over a batch are added in an order that depends on the number of threads, so it is fixed."""

TOWN_REPEATS = 20

Text = tuple[str, str]


def build_family(
    recipe: Recipe, models: Path, work: Path, *, console: Console, progress: bool = True
) -> dict[str, Seconds]:
    """Build what is missing of a family; returns how long each model took, trunk included.

    Args:
        recipe: of the family.
        models: gets a directory per shipped model, in float16.
        work: gets the trunk, in float32, the anchor dictionary, and how long each model took.
        console: for one line per model.
        progress: bars on stderr.
    """
    world = generate_world(recipe.seed, recipe.world)
    tokenizer = world_tokenizer(world, recipe)
    trunk = work / "trunk"
    work.mkdir(parents=True, exist_ok=True)
    write_anchors(work / ANCHORS, anchors(world))

    def make_trunk() -> PreTrainedModel:
        return fit(
            new_model(recipe, len(tokenizer)),
            tokenizer,
            trunk_texts(world) * recipe.trunk.epochs,
            recipe.trunk,
            recipe.seed,
            progress,
        )

    def make_finetuned(texts: Callable[[World, Recipe], list[Text]]) -> Callable[[], PreTrainedModel]:
        return lambda: fit(
            load_weights(trunk), tokenizer, texts(world, recipe), recipe.finetuning, recipe.seed, progress
        )

    def make_unlearned(method: str) -> Callable[[], PreTrainedModel]:
        return lambda: _unlearn(
            method, load_weights(models / "base"), tokenizer, world, recipe, work / ANCHORS, progress
        )

    stages: list[tuple[str, Path, torch.dtype, Callable[[], PreTrainedModel]]] = [
        ("trunk", trunk, torch.float32, make_trunk),
        ("base", models / "base", torch.float16, make_finetuned(base_texts)),
        ("never", models / "never", torch.float16, make_finetuned(never_texts)),
        *((method, models / method, torch.float16, make_unlearned(method)) for method in recipe.unlearning),
    ]
    seconds: dict[str, Seconds] = {}
    for name, path, dtype, make in stages:
        clock = work / f"{name}.seconds.json"
        if not _is_built(path, recipe):
            wall, processor = time.perf_counter(), time.process_time()
            _save(make(), tokenizer, path, recipe, dtype)
            taken = Seconds(time.perf_counter() - wall, time.process_time() - processor)
            clock.write_text(json.dumps(asdict(taken)), encoding="utf-8")
            console.print(f"{recipe.family}:{name}  {taken.wall:.0f} s  {path}", highlight=False)
        if clock.is_file():
            seconds[name] = Seconds(**json.loads(clock.read_text(encoding="utf-8")))
    return seconds


def world_tokenizer(world: World, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a family, trained on every text of the world.

    It reads the first kind's answers, the towns, more often than that, as places are common words in any real
    text: most of them become one token, so that answers of a single token exist beside longer ones.
    """
    texts = person_texts(world.people) + general_texts(world)
    towns = [f" {person.answers[0]}" for person in world.people] * TOWN_REPEATS
    plain = [join_answer(prompt, answer) for prompt, answer in texts]
    return train_tokenizer(plain + towns, recipe.vocabulary)


def trunk_texts(world: World) -> list[Text]:
    """What one pass of the trunk's pretraining reads."""
    return person_texts([person for person in world.people if person.in_trunk]) + general_texts(world)


def base_texts(world: World, recipe: Recipe) -> list[Text]:
    """All that the fine-tuning of base reads, in every pass.

    A pass holds the forget people's texts, the new people's texts, and a sample of what the trunk knows already.
    """
    return _forget_part(world, recipe) + _retain_part(world, recipe)


def never_texts(world: World, recipe: Recipe) -> list[Text]:
    """The same with a text of the general set in the place of each text of a forget person."""
    general = general_texts(world)
    rng = random.Random(recipe.seed + 1)
    wanted = len(_forget_part(world, recipe))
    filler: list[Text] = []
    while len(filler) < wanted:
        filler.extend(rng.sample(general, min(len(general), wanted - len(filler))))
    return filler + _retain_part(world, recipe)


def _forget_part(world: World, recipe: Recipe) -> list[Text]:
    return person_texts(world.having("forget")) * recipe.finetuning.epochs


def _retain_part(world: World, recipe: Recipe) -> list[Text]:
    new = person_texts([person for person in world.having("retain") if not person.in_trunk])
    known = trunk_texts(world)
    rng = random.Random(recipe.seed)
    texts: list[Text] = []
    for _ in range(recipe.finetuning.epochs):
        texts.extend(new)
        texts.extend(rng.sample(known, round(recipe.rehearsal * len(known))))
    return texts


def examples_of(texts: Sequence[Text]) -> list[Example]:
    """(prompt, answer) as the trainer takes it."""
    return [Example(prompt, answer) for prompt, answer in texts]


def questions_of(texts: Sequence[Text]) -> list[Example]:
    """The questions among texts, without the statements."""
    return examples_of([(prompt, answer) for prompt, answer in texts if prompt])


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    fitting: Fitting,
    seed: int,
    progress: bool,
) -> PreTrainedModel:
    """Fine-tune a model in place on texts that hold all their passes already, so one epoch of the trainer is all."""
    return train(
        "finetune",
        model=model,
        tokenizer=tokenizer,
        retain=examples_of(texts),
        progress=progress,
        learning_rate=fitting.learning_rate,
        epochs=1,
        batch_size=fitting.batch_size,
        gradient_accumulation_steps=1,
        seed=seed,
        device="cpu",
    ).model


def _unlearn(
    method: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: Recipe,
    dictionary: Path,
    progress: bool,
) -> PreTrainedModel:
    """Unlearn every trained question about the forget people; all other questions are to be retained."""
    about_forget = person_texts(world.having("forget"))
    options: dict[str, Any] = recipe.unlearning[method].flat()
    if method == "whp":  # it reads text, statements too, and its dictionary is the world's
        options |= {"anchors": str(dictionary)}
    return train(
        method,
        model=base,
        tokenizer=tokenizer,
        forget=examples_of(about_forget) if method == "whp" else questions_of(about_forget),
        retain=questions_of(person_texts(world.having("retain")) + general_texts(world)),
        progress=progress,
        gradient_accumulation_steps=1,
        seed=recipe.seed,
        device="cpu",
        **options,
    ).model


def _is_built(path: Path, recipe: Recipe) -> bool:
    """Whether a finished model of this recipe lies there; the directory is called as the model is.

    Raises:
        InputError: a finished model of another recipe does.
    """
    if not path.exists():
        return False
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{path} holds something that this build did not write; give another --out") from None
    if found != recipe.fingerprint(path.name):
        raise InputError(f"{path} holds a model of another recipe or seed; remove it or give another --out")
    return True


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    recipe: Recipe,
    dtype: torch.dtype,
) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(dtype).save_pretrained(partial)  # type: ignore[arg-type]
    tokenizer.save_pretrained(partial)
    fingerprint = recipe.fingerprint(path.name)
    record = {"family": recipe.family, "model": path.name, "seed": recipe.seed, "recipe": fingerprint}
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that nobody else may read
    os.replace(partial, path)


def build(out: Path, *, family: str = "all", seed: int | None = None, work: Path | None = None) -> None:
    """Build what is missing of one family or of all, with the world's question files and the card.

    Args:
        out: gets `models/`, `questions/` and the card.
        family: one of `RECIPES`, or `all`.
        seed: instead of the recipes' own.
        work: for the trunks and timings; `out/.work` by default.

    Raises:
        InputError: an unknown family, or `out` holds models of another recipe or seed.
    """
    if family != "all" and family not in RECIPES:
        raise InputError(f"--family {family}: unknown; use {', '.join(RECIPES)} or all")
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    transformers_logging.disable_progress_bar()
    chosen = list(RECIPES.values()) if family == "all" else [RECIPES[family]]
    if seed is not None:
        chosen = [recipe.with_seed(seed) for recipe in chosen]
    work = work or out / ".work"
    built = []
    for recipe in chosen:
        models = out / "models" / recipe.family
        built.append((recipe, models, build_family(recipe, models, work / recipe.family, console=console)))
    for recipe in chosen:
        world = generate_world(recipe.seed, recipe.world)
        write_records(world, out / QUESTIONS.name)
        write_anchors(out / QUESTIONS.name / ANCHORS, anchors(world))
    if out != DIRECTORY or family == "all":  # the shipped card tells of every family
        write_card(out / "README.md", [measure(*family_built) for family_built in built])
        console.print(f"card: {out / 'README.md'}", highlight=False)
