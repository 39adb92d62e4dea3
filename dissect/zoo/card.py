"""Write the model card of the built-in models: measured exact answers and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dissect.zoo.paths import DIRECTORY
from dissect.zoo.recipes import AIM, Recipe
from dissect.zoo.world import Record, chance, generate_world, record_sets
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.metrics.text_match import exact_match

BEGIN, END = "<!-- measured: written by dissect.zoo.build -->", "<!-- measured: end -->"
"""Comments around the measured part of the card."""

MAX_NEW_TOKENS = 12
"""Length of a generation, in tokens; longer than any answer of the world."""


@dataclass(frozen=True)
class Seconds:
    """Training time of a model, in seconds.

    Attributes:
        wall: Wall-clock time.
        processor: CPU time.
    """

    wall: float
    processor: float


@dataclass(frozen=True)
class Measured:
    """Measurements of a family.

    Attributes:
        recipe: Recipe of the family.
        seconds: Training time of each model whose time is known, the pretrained model included.
        scores: Fraction of exact answers, by model and question set.
        megabytes: Size of all files, in units of 10^6 bytes.
        parameters: Number of parameters of one model.
    """

    recipe: Recipe
    seconds: Mapping[str, Seconds]
    scores: Mapping[str, Mapping[str, float]]
    megabytes: float
    parameters: int


def exact_share(model_directory: Path, records: Sequence[Record]) -> float:
    """Return the fraction of questions that a saved model answers exactly (greedy decoding in float32).

    Args:
        model_directory: Directory of the model.
        records: Prompt records with answers.

    Returns:
        A number from 0 to 1.
    """
    model, tokenizer = load_weights(model_directory), load_tokenizer(model_directory)
    prompts = [record["prompt"] for record in records]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
    right = [exact_match(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    return sum(right) / len(right)


def measure(recipe: Recipe, models: Path, seconds: Mapping[str, Seconds]) -> Measured:
    """Ask every model of a family every question of the world.

    Args:
        recipe: Recipe of the family.
        models: Directory of the family's models.
        seconds: Training time of each model whose time is known.

    Returns:
        The measurements.
    """
    sets = record_sets(generate_world(recipe.seed, recipe.world))
    scores = {
        name: {kind: exact_share(models / name, records) for kind, records in sets.items()} for name in recipe.models
    }
    size = sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
    return Measured(recipe, seconds, scores, size / 1e6, load_weights(models / "base").num_parameters())


def write_card(path: Path, measured: Sequence[Measured]) -> None:
    """Write the card: the shipped text with the measured part replaced.

    Args:
        path: File to write.
        measured: Measurements of each family.
    """
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    block = "\n\n".join(_section(family) for family in measured)
    path.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")


def _section(measured: Measured) -> str:
    recipe = measured.recipe
    world = generate_world(recipe.seed, recipe.world)
    sets = list(record_sets(world))
    rows = [
        [
            f"`{recipe.family}:{model}`",
            *(f"{100 * measured.scores[model][name]:.1f}" for name in sets),
            _aim_reached(measured.scores[model]) if model in recipe.unlearning else "",
        ]
        for model in recipe.models
    ]
    guesses = {role: f"{100 * chance(world.having(role)):.1f}" for role in ("forget", "retain")}
    rows.append(["best constant answer per kind", *(guesses.get(name.split("_")[0], "") for name in sets), ""])
    aim = f"forget <= {100 * AIM.forget_at_most:.0f}, retain >= {100 * AIM.retain_at_least:.0f}"
    head = ["exact answers, %", *(name.replace("_", " ") for name in sets), aim]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(
        [
            f"### {recipe.family}",
            "",
            *lines,
            "",
            f"{measured.parameters:,} parameters per model; {measured.megabytes:.1f} MB in total; seed {recipe.seed}.",
            _times(measured.seconds),
        ]
    )


def _aim_reached(scores: Mapping[str, float]) -> str:
    """Return `met`, or `missed` with the names of the question sets."""
    missed = AIM.missed(scores)
    return "met" if not missed else "missed: " + ", ".join(name.replace("_", " ") for name in missed)


def _times(seconds: Mapping[str, Seconds]) -> str:
    if not seconds:
        return "Training times were not recorded."
    each = ", ".join(f"{name} {taken.processor:.0f} s" for name, taken in seconds.items())
    processor = sum(taken.processor for taken in seconds.values()) / 60
    return f"Training on one thread: {processor:.1f} minutes of CPU time ({each})."
