"""The unlearned models: every method down to a common level of forgetting."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unlearning
from analyses.defaults.run import FIRST
from analyses.resistance.worlds import World
from unlearning.methods import METHODS

UNSTOPPED = frozenset({"undo", "circuit_breakers"})
"""Methods that begin by losing what is to stay and then bring it back, so that they are not stopped on the way."""

LEAST_RETAINED = 0.5
"""Training stops where less than this share of the retain answers' probability is left, whatever was forgotten."""

COMPARED = (
    *("npo", "grad_diff", "simnpo", "dpo", "wga", "undial", "pdu", "blur", "rmu", "elm", "oracle"),
    *("sam_npo", "sure", "tar", "circuit_breakers", "ilu", "lat", "mudman", "layered", "undo"),
)
"""Methods with a retain loss; those of the second line were made to resist relearning, rounding or attacks."""


@dataclass(frozen=True)
class Unlearned:
    """A trained model.

    Attributes:
        directory: Its directory.
        forget, retain: Mean probability of the answers that is left, as a share of the base's.
        steps: Optimizer steps.
        stopped_by: What ended the training before its last planned step; None if nothing did.
    """

    directory: Path
    forget: float
    retain: float
    steps: int
    stopped_by: str | None


def unlearn(world: World, method: str, directory: Path, *, seed: int, level: float, progress: bool) -> Unlearned:
    """Train a model until its forget answers have come down to a level; a finished one is read.

    Args:
        world: The base and its data.
        method: The unlearning method, with its defaults.
        directory: Directory of the run.
        seed: Seed of the training.
        level: Mean probability of the forget answers at which the training stops.
        progress: Show progress bars on stderr.

    Returns:
        The model. Its first stage, if it has one, is beside it and stopped at the level.
    """
    base, before = world.base, None
    if method in FIRST:  # shares are of what the base knew, not of the first stage's model
        first = directory.with_name(f"{directory.name}-first")
        before = _train(world, FIRST[method], base, first, seed, level, progress=progress).evaluations[0]
        base = str(first)
    result = _train(world, method, base, directory, seed, level, progress=progress)
    before = before or result.evaluations[0]
    left = {name: result.final[f"{name}_probability"] / before[f"{name}_probability"] for name in ("forget", "retain")}
    steps = int(result.history[-1]["step"])
    return Unlearned(directory, left["forget"], left["retain"], steps, result.stopped_by)


def _train(
    world: World, method: str, base: str, directory: Path, seed: int, level: float, *, progress: bool
) -> unlearning.TrainResult:
    stop: dict[str, Any] = {} if method in UNSTOPPED else {"target_forget": level, "target_retain": LEAST_RETAINED}
    own = world.own.get(method, {})
    needs = METHODS[method].needs(METHODS[method].options(**own))
    return unlearning.train(
        method,
        model=base,
        forget=world.forget,
        retain=world.retain if needs.retain else None,
        output_dir=directory,
        resume=True,
        progress=progress,
        seed=seed,
        **stop,
        **world.options,
        **own,
    )
