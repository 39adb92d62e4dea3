"""Small models whose knowledge is known by construction, for checking verdicts.

A family is one world with its own names and facts, one architecture and one seed. Its pretrained model, its base and
its control are made as the built-in ones are and lie in the directories `trunk`, `base` and `never`; every other model
is a construction (`analyses.verdict_benchmark.constructions`).

    FOLDER/FAMILY/MODEL/       a checkpoint, with truth.json: what it is, and what it answers
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dissect.zoo.builder import Text, base_texts, fit, never_texts, pretraining_texts, questions_of, world_tokenizer
from dissect.zoo.recipes import Architecture, Fitting, Recipe, new_model
from dissect.zoo.world import Person, World, WorldSize, general_texts, generate_world, person_records, person_texts
from unlearning import Example, InputError
from unlearning.checkpoints.load import load_weights
from unlearning.common.runs import write_json

Kind = Literal["erased", "suppressed", "partial", "not unlearned"]

TRUTH = "truth.json"

SIZE = WorldSize(forget_people=24, trunk_people=32, new_people=12, values=32, things=16, largest_summand=6)

ARCHITECTURES = {
    "llama": Architecture("llama", layers=6, d_model=96, d_mlp=256, heads=4, key_value_heads=2),
    "neox": Architecture("gpt_neox", layers=6, d_model=96, d_mlp=256, heads=4, key_value_heads=4),
}


@dataclass(frozen=True)
class Truth:
    """What a model is by construction.

    Attributes:
        kind: What the model knows of the forget facts.
        share: Share of the forget facts that its weights hold, in [0, 1]; None if only the making is known.
    """

    kind: Kind
    share: float | None


@dataclass(frozen=True)
class Family:
    """One world, one architecture, one seed.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        seed: Random seed of the world, the weights and the orders of the data.
        folder: Directory with one directory per family.
        size: Size of the world.
        epochs: Passes of training the pretrained model, and of training the base.
    """

    architecture: str
    seed: int
    folder: Path
    size: WorldSize = SIZE
    epochs: tuple[int, int] = (6, 5)

    @property
    def name(self) -> str:
        """Name of its directory, such as `llama-7`."""
        return f"{self.architecture}-{self.seed}"

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.folder / self.name

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of pretrained model, base and control."""
        return Recipe(
            family=self.name,
            architecture=ARCHITECTURES[self.architecture],
            pretraining=Fitting(learning_rate=3e-3, epochs=self.epochs[0]),
            finetuning=Fitting(learning_rate=1.5e-3, epochs=self.epochs[1]),
            unlearning={},
            seed=self.seed,
            world=self.size,
            vocabulary=700,
        )

    @cached_property
    def world(self) -> World:
        """Its people and things."""
        return generate_world(self.seed, self.size)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of all its models."""
        return world_tokenizer(self.world, self.recipe)

    @property
    def forget_people(self) -> tuple[Person, ...]:
        """People whose facts are to be forgotten."""
        return self.world.having("forget")

    @cached_property
    def forget(self) -> list[Example]:
        """Every trained question about the forget people."""
        return questions_of(person_texts(self.forget_people))

    @cached_property
    def retain(self) -> list[Example]:
        """Every other trained question."""
        return questions_of(person_texts(self.world.having("retain")) + general_texts(self.world))

    def load(self, name: str) -> PreTrainedModel:
        """Load a model of the family that was built."""
        return load_weights(self.path / name)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that decides pretrained model, base and control."""
        return {
            "architecture": asdict(ARCHITECTURES[self.architecture]),
            "seed": self.seed,
            "size": asdict(self.size),
            "epochs": list(self.epochs),
        }


def build(
    family: Family,
    name: str,
    make: Callable[[Family], PreTrainedModel],
    *,
    truth: Truth | None = None,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Build a model unless it exists.

    Args:
        family: The family of the model.
        name: Name of its directory.
        make: Function from the family to the model.
        truth: What the model is; None for pretrained model and control, which are not judged.
        recipe: Everything that decides the model, besides the family.

    Returns:
        The model's directory.

    Raises:
        InputError: The directory holds a model of another recipe.
    """
    path = family.path / name
    configuration = json.loads(json.dumps({"family": family.fingerprint(), "recipe": recipe or {}}))
    if path.exists():
        record = json.loads((path / TRUTH).read_text(encoding="utf-8"))
        if record["configuration"] != configuration:
            raise InputError(f"{path}: holds a model of another recipe. Remove it, or give another `out`")
        return path
    partial = path.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted build
    model = make(family).eval()
    model.save_pretrained(partial)
    family.tokenizer.save_pretrained(partial)
    record = {
        "configuration": configuration,
        "kind": truth.kind if truth else None,
        "share": truth.share if truth else None,
        "answers": answers(model, family),
    }
    write_json(partial / TRUTH, record)
    os.replace(partial, path)
    return path


def answers(model: PreTrainedModel, family: Family) -> dict[str, float]:
    """Measure the shares of exact greedy answers to unseen wordings.

    Args:
        model: The model.
        family: Its family.

    Returns:
        The share by `forget` and `retain`.
    """
    from unlearning.evaluation.generation import greedy_answers

    found = {}
    for role in ("forget", "retain"):
        records = person_records(family.world.having(role), held_out=True)
        prompts = [record["prompt"] for record in records]
        given = greedy_answers(model.eval(), family.tokenizer, prompts, max_new_tokens=10, batch_size=128)
        found[role] = sum(s.strip() == r["answer"] for s, r in zip(given, records, strict=True)) / len(records)
    return found


def build_ground(family: Family) -> None:
    """Build pretrained model, base and control of a family."""
    build(family, "trunk", _trunk)
    build(family, "base", lambda one: finetuned(one, base_texts(one.world, one.recipe), order=0), truth=None)
    build(family, "never", lambda one: finetuned(one, never_texts(one.world, one.recipe), order=0), truth=None)


def _trunk(family: Family) -> PreTrainedModel:
    """Train the family's pretrained model."""
    recipe = family.recipe
    texts = pretraining_texts(family.world) * recipe.pretraining.epochs
    model = new_model(recipe, len(family.tokenizer))
    return fit(model, family.tokenizer, texts, recipe.pretraining, family.seed, False)


def finetuned(family: Family, texts: Sequence[Text], *, order: int) -> PreTrainedModel:
    """Fine-tune the family's pretrained model.

    Args:
        family: The family.
        texts: Texts of all passes.
        order: Number of the texts' order; another number is another order.

    Returns:
        The fine-tuned model.
    """
    seed = family.seed + 1000 * order
    return fit(family.load("trunk"), family.tokenizer, texts, family.recipe.finetuning, seed, False)
