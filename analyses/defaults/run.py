"""Train every method with its defaults, and measure what is left."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import unlearning
from analyses.defaults.worlds import World
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError
from unlearning.common.runs import write_bytes
from unlearning.data.encoding import encode
from unlearning.data.question_answer import Example
from unlearning.evaluation.answers import answer_likelihoods
from unlearning.methods import METHODS
from unlearning.training.tuning import FORGOTTEN, KEPT

NAMES = tuple(name for name, method in METHODS.items() if method.forget_loss is not None)
"""Every method that forgets."""

FIRST = {"undo": "npo"}
"""Methods that begin with an unlearned model, with the method that makes it."""


@dataclass(frozen=True)
class Row:
    """What one method did.

    Attributes:
        world, method: The base's name and the method's.
        forget_before, forget_after: Mean probability of the forget answers.
        retain_before, retain_after: Mean probability of the retain answers.
        learning_rate: Peak learning rate that the recipe chose.
        steps: Optimizer steps.
        seconds: Wall time of the training.
        refused: Why the method could not be run with its defaults; None if it was.
    """

    world: str
    method: str
    forget_before: float
    retain_before: float
    forget_after: float = float("nan")
    retain_after: float = float("nan")
    learning_rate: float = float("nan")
    steps: int = 0
    seconds: float = 0.0
    refused: str | None = None

    @property
    def forgot(self) -> bool:
        """True if as little of the forget answers' probability is left as `--tune` aims at."""
        return self.forget_after <= FORGOTTEN * self.forget_before

    @property
    def kept(self) -> bool:
        """True if as much of the retain answers' probability is left as `--tune` aims at."""
        return self.retain_after >= KEPT * self.retain_before


def run(world: World, out: Path, *, methods: Sequence[str] = NAMES, progress: bool = True) -> list[Row]:
    """Try methods on a world.

    Args:
        world: The base and its data.
        out: Output directory; methods that were tried before are read from it.
        methods: Names of the methods.
        progress: Show progress bars on stderr.

    Returns:
        One row a method.
    """
    path = locate_checkpoint(world.base)
    tokenizer = load_tokenizer(path)
    before = _asked(load_weights(path), tokenizer, world)
    rows = []
    for method in methods:
        kept = out / world.name / f"{method}.json"
        if not kept.is_file():
            row = _tried(world, method, before, tokenizer, path, progress=progress)
            write_bytes(kept, (json.dumps(asdict(row), indent=1) + "\n").encode())
        rows.append(Row(**json.loads(kept.read_text(encoding="utf-8"))))
    return rows


def _tried(
    world: World,
    method: str,
    before: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    progress: bool,
) -> Row:
    row = Row(world.name, method, forget_before=before["forget"], retain_before=before["retain"])
    model = load_weights(path)
    began = time.perf_counter()
    try:
        if method in FIRST:
            _trained(world, FIRST[method], model, tokenizer, progress=progress)
        result = _trained(world, method, model, tokenizer, progress=progress)
    except InputError as error:
        return replace(row, refused=str(error))
    after = _asked(result.model, tokenizer, world)
    return replace(
        row,
        forget_after=after["forget"],
        retain_after=after["retain"],
        learning_rate=float(result.options["learning_rate"]),
        steps=int(result.history[-1]["step"]),
        seconds=round(time.perf_counter() - began, 1),
    )


def _trained(
    world: World, method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, progress: bool
) -> unlearning.TrainResult:
    """Train a model in place with a method's defaults."""
    own = world.own.get(method, {})
    # What a method needs is asked with the options that it cannot do without.
    needs = METHODS[method].needs(METHODS[method].options(**own))
    return unlearning.train(
        method,
        model=model,
        tokenizer=tokenizer,
        forget=world.forget,
        retain=world.retain if needs.retain else None,
        progress=progress,
        **world.options,
        **own,
    )


def _asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> dict[str, float]:
    """Return the mean probability of the answers, without an end of sequence, of each set."""

    def mean(examples: Sequence[Example]) -> float:
        spans = encode(tokenizer, examples, append_eos=False, max_length=None).spans
        return answer_likelihoods(model, spans, batch_size=32)["probability"]

    return {"forget": mean(world.forget), "retain": mean(world.retain)}
