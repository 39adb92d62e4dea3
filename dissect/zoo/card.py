"""The zoo's card: what the built models answer, measured, and how large they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dissect.zoo import DIRECTORY
from dissect.zoo.recipes import AIM, Recipe
from dissect.zoo.world import Record, chance, generate_world, record_sets
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.metrics.text_match import exact_match

BEGIN, END = "<!-- measured: written by dissect.zoo.build -->", "<!-- measured: end -->"
MAX_NEW_TOKENS = 12
"""More than any answer of the world has."""


@dataclass(frozen=True)
class Seconds:
    """How long a model's training took: by the clock on the wall, and of a processor."""

    wall: float
    processor: float


@dataclass(frozen=True)
class Measured:
    """A family as built.

    Attributes:
        recipe: what it was built from.
        seconds: what each model's training took, trunk included, as far as it is known.
        scores: by model and question set, the share of answers that are exactly right.
        megabytes: of all its files, in units of 10^6 bytes.
        parameters: of one model.
    """

    recipe: Recipe
    seconds: Mapping[str, Seconds]
    scores: Mapping[str, Mapping[str, float]]
    megabytes: float
    parameters: int


def exact_share(model_directory: Path, records: Sequence[Record]) -> float:
    """The share of the records' questions that a saved model answers exactly, decoding greedily in float32."""
    model, tokenizer = load_weights(model_directory), load_tokenizer(model_directory)
    prompts = [record["prompt"] for record in records]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
    right = [exact_match(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    return sum(right) / len(right)


def measure(recipe: Recipe, models: Path, seconds: Mapping[str, Seconds]) -> Measured:
    """Ask every model of a family every question of the world."""
    sets = record_sets(generate_world(recipe.seed, recipe.world))
    scores = {
        name: {kind: exact_share(models / name, records) for kind, records in sets.items()} for name in recipe.models
    }
    size = sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
    return Measured(recipe, seconds, scores, size / 1e6, load_weights(models / "base").num_parameters())


def write_card(path: Path, measured: Sequence[Measured]) -> None:
    """Write the card, with the measured block replaced, and everything around it as in the shipped one."""
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
            _verdict(measured.scores[model]) if model in recipe.unlearning else "",
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
            f"{measured.parameters:,} parameters a model; {measured.megabytes:.1f} MB in all; seed {recipe.seed}.",
            _times(measured.seconds),
        ]
    )


def _verdict(scores: Mapping[str, float]) -> str:
    """`met`, or what is missed and by which set."""
    missed = AIM.missed(scores)
    return "met" if not missed else "missed: " + ", ".join(name.replace("_", " ") for name in missed)


def _times(seconds: Mapping[str, Seconds]) -> str:
    if not seconds:
        return "How long the training took was not recorded."
    each = ", ".join(f"{name} {taken.processor:.0f} s" for name, taken in seconds.items())
    processor = sum(taken.processor for taken in seconds.values()) / 60
    return f"One thread, {processor:.1f} minutes of one core ({each})."
