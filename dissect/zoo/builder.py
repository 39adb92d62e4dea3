"""Build the built-in models from random weights; `python -m dissect.zoo.build` is the command line.

A family has a tokenizer and a pretrained model, trained on the general set and part of the retain people's facts. From
the pretrained model come

- `base`: fine-tuned on all people's facts;
- `never` (the control): fine-tuned for as many steps on the same retain facts, with texts of the general set in place
  of the texts about forget people;

and from the shipped base one model per unlearning method: unlearned on the forget questions with a retain term. (Who's
Harry Potter trains on text, so it also gets the statements.)

One thread and seeded orders give the same bytes on the same machine. Each model is written to a temporary directory,
which is then renamed, so a build that was stopped resumes after the last finished model.
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

from dissect.zoo.card import Seconds, measure, write_card
from dissect.zoo.paths import DIRECTORY, QUESTIONS
from dissect.zoo.recipes import RECIPES, Fitting, Recipe, new_model
from dissect.zoo.tokenizer import train_tokenizer
from dissect.zoo.world import World, anchors, general_texts, generate_world, person_texts, write_records
from unlearning import Example, InputError, train
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.data.spans import join_answer
from unlearning.methods.whp.anchors import write_anchors

RECORD = "build.json"
"""File in a model's directory that names the recipe."""

ANCHORS = "anchors.json"
"""File of the dictionary of Who's Harry Potter."""

THREADS = 1
"""Number of threads. The order of additions in a sum depends on it, so it is fixed."""

TOWN_REPEATS = 20
"""Occurrences of each person's town in the tokenizer's training text."""

Text = tuple[str, str]
"""Prompt and answer; a statement has the prompt ""."""


def build_family(
    recipe: Recipe, models: Path, work: Path, *, console: Console, progress: bool = True
) -> dict[str, Seconds]:
    """Build the models of a family that do not exist yet.

    Args:
        recipe: Recipe of the family.
        models: Directory of the shipped models, one subdirectory each, in float16.
        work: Directory of the pretrained model (float32), the anchor dictionary and the training times.
        console: Console that gets one line per model.
        progress: Show progress bars on stderr.

    Returns:
        Training time of each model whose time is known, the pretrained model included.

    Raises:
        InputError: A directory holds a model of another recipe, or something else.
    """
    world = generate_world(recipe.seed, recipe.world)
    tokenizer = world_tokenizer(world, recipe)
    pretrained = work / "pretrained"
    work.mkdir(parents=True, exist_ok=True)
    write_anchors(work / ANCHORS, anchors(world))

    def make_pretrained() -> PreTrainedModel:
        return fit(
            new_model(recipe, len(tokenizer)),
            tokenizer,
            pretraining_texts(world) * recipe.pretraining.epochs,
            recipe.pretraining,
            recipe.seed,
            progress,
        )

    def make_finetuned(texts: Callable[[World, Recipe], list[Text]]) -> Callable[[], PreTrainedModel]:
        return lambda: fit(
            load_weights(pretrained), tokenizer, texts(world, recipe), recipe.finetuning, recipe.seed, progress
        )

    def make_unlearned(method: str) -> Callable[[], PreTrainedModel]:
        return lambda: _unlearn(
            method, load_weights(models / "base"), tokenizer, world, recipe, work / ANCHORS, progress
        )

    stages: list[tuple[str, Path, torch.dtype, Callable[[], PreTrainedModel]]] = [
        ("pretrained", pretrained, torch.float32, make_pretrained),
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
    """Train the tokenizer of a family on every text of the world.

    The towns, answers of the first kind of fact, are repeated. Most of them then become a single token, so that
    answers of one token exist beside longer answers.

    Args:
        world: World of the texts.
        recipe: Recipe of the family, with the size of the vocabulary.

    Returns:
        The tokenizer.
    """
    texts = person_texts(world.people) + general_texts(world)
    towns = [f" {person.answers[0]}" for person in world.people] * TOWN_REPEATS
    plain = [join_answer(prompt, answer) for prompt, answer in texts]
    return train_tokenizer(plain + towns, recipe.vocabulary)


def pretraining_texts(world: World) -> list[Text]:
    """Return the texts of one pass of the pretraining."""
    return person_texts([person for person in world.people if person.in_pretraining]) + general_texts(world)


def base_texts(world: World, recipe: Recipe) -> list[Text]:
    """Return the fine-tuning texts of `base`, all passes together.

    Each pass has the texts about forget people, the texts about new people and a sample of the pretraining texts.

    Args:
        world: World of the texts.
        recipe: Recipe with the number of passes and the seed.

    Returns:
        Texts, unshuffled.
    """
    return _forget_part(world, recipe) + _retain_part(world, recipe)


def never_texts(world: World, recipe: Recipe) -> list[Text]:
    """Return the fine-tuning texts of `never`, all passes together.

    They are those of `base` with a text of the general set in place of each text about a forget person.

    Args:
        world: World of the texts.
        recipe: Recipe with the number of passes and the seed.

    Returns:
        Texts, unshuffled.
    """
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
    new = person_texts([person for person in world.having("retain") if not person.in_pretraining])
    known = pretraining_texts(world)
    rng = random.Random(recipe.seed)
    texts: list[Text] = []
    for _ in range(recipe.finetuning.epochs):
        texts.extend(new)
        texts.extend(rng.sample(known, round(recipe.rehearsal * len(known))))
    return texts


def examples_of(texts: Sequence[Text]) -> list[Example]:
    """Convert pairs of prompt and answer into training examples."""
    return [Example(prompt, answer) for prompt, answer in texts]


def questions_of(texts: Sequence[Text]) -> list[Example]:
    """Convert the questions among the texts into training examples, without the statements."""
    return examples_of([(prompt, answer) for prompt, answer in texts if prompt])


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    fitting: Fitting,
    seed: int,
    progress: bool,
) -> PreTrainedModel:
    """Train a model in place by cross-entropy, for one epoch.

    Args:
        model: Model to train.
        tokenizer: Tokenizer of the texts.
        texts: Training texts of all passes.
        fitting: Learning rate and batch size; `fitting.epochs` is not used, since `texts` repeats the passes.
        seed: Random seed of the order.
        progress: Show a progress bar on stderr.

    Returns:
        The trained model.
    """
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


def build_unlearned(
    recipe: Recipe, method: str, path: Path, *, base: Path, dictionary: Path, progress: bool = True
) -> None:
    """Unlearn a built base with one method of its recipe, and save the model.

    Args:
        recipe: Recipe of the family.
        method: Unlearning method.
        path: Directory of the model, named like the method; its parent exists.
        base: Directory of the base model.
        dictionary: Anchor dictionary of the world, for Who's Harry Potter.
        progress: Show a progress bar on stderr.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        world, tokenizer = generate_world(recipe.seed, recipe.world), load_tokenizer(base)
        model = _unlearn(method, load_weights(base), tokenizer, world, recipe, dictionary, progress)
        _save(model, tokenizer, path, recipe, torch.float16)
    finally:
        torch.set_num_threads(threads)


def _unlearn(
    method: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: Recipe,
    dictionary: Path,
    progress: bool,
) -> PreTrainedModel:
    """Unlearn all trained questions about the forget people, with all other questions as the retain set."""
    about_forget = person_texts(world.having("forget"))
    options: dict[str, Any] = recipe.unlearning[method].flat()
    if method == "whp":
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
    """Return whether the directory, named like the model, holds a finished model of this recipe.

    Raises:
        InputError: The directory holds a model of another recipe, or something else.
    """
    if not path.exists():
        return False
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{path} exists and was not written by this build. Choose another `out`, or remove it."
        ) from None
    if found != recipe.fingerprint(path.name):
        raise InputError(f"{path} holds a model of another recipe or seed. Choose another `out`, or remove it.")
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
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(partial, path)


def build(out: Path, *, family: str = "all", seed: int | None = None, work: Path | None = None) -> None:
    """Build the models that do not exist yet, with question sets and model card.

    Args:
        out: Directory of `models/`, `questions/` and the card.
        family: Name of a family in `RECIPES`, or `all`.
        seed: Random seed instead of the recipes' own.
        work: Directory of the pretrained models and timings; None for `out/.work`.

    Raises:
        InputError: The family is unknown, or `out` holds models of another recipe or seed.
    """
    if family != "all" and family not in RECIPES:
        raise InputError(f"`family` must be one of {', '.join(RECIPES)}, all, got {family!r}")
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
    if out != DIRECTORY or family == "all":  # the shipped card describes all families
        write_card(out / "README.md", [measure(*family_built) for family_built in built])
        console.print(f"card: {out / 'README.md'}", highlight=False)
