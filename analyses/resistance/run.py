"""Train, attack and judge: one model after the other, each kept as soon as it is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.resistance.attacks import CURVE, RATES, relearning, rounded, unattacked
from analyses.resistance.models import unlearn
from analyses.resistance.worlds import World
from dissect import load_pair, load_prompts, verdict
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import Case, make_case
from unlearning.common.runs import write_bytes

CONTROL = "control"
"""Name of the control's rows: relearning from nothing."""

LIMIT = 120
"""Largest number of forget facts that the attacks ask."""


@dataclass(frozen=True)
class Found:
    """What is known of one model.

    Attributes:
        world, method, seed: The model; `method` is `control` for the model that never knew.
        forget, retain: Mean probability of the answers that is left, as a share of the base's; NaN of the control.
        steps: Optimizer steps of the unlearning.
        stopped_by: What ended it before its last planned step.
        base: Mean rank of the answers in the base, by attack; nothing attacks it.
        curves: Rows of `attacks.relearning`.
        rounded: Mean rank after rounding to 4 bits; None where that could not be run.
        label, score, low, high: The verdict; None where none was asked for.
    """

    world: str
    method: str
    seed: int
    forget: float = float("nan")
    retain: float = float("nan")
    steps: int = 0
    stopped_by: str | None = None
    base: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    rounded: float | None = None
    label: str | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None


def run(
    world: World,
    out: Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    level: float = 0.1,
    rates: Sequence[float] = RATES,
    curve: Sequence[int] = CURVE,
    judge: bool = True,
    progress: bool = True,
) -> list[Found]:
    """Study methods on a world.

    Args:
        world: The base and its data.
        out: Output directory; models that are known already are read from it.
        methods: Names of the methods.
        seeds: Seeds of the training, which are those of the attacks too.
        level: Mean probability of the forget answers to which every method forgets.
        rates: Sizes of a step of relearning.
        curve: Numbers of steps of relearning.
        judge: Ask for a verdict too.
        progress: Show progress bars on stderr.

    Returns:
        One entry per model, the control's first.
    """
    found = []
    controls = (CONTROL,) if world.control is not None else ()
    for seed in seeds:
        for method in (*controls, *methods):
            kept = out / world.name / f"{method}-seed{seed}.json"
            if not kept.is_file():
                entry = _studied(world, out, method, seed, level, rates, curve, judge=judge, progress=progress)
                write_bytes(kept, (json.dumps(asdict(entry), indent=1) + "\n").encode())
            found.append(Found(**json.loads(kept.read_text(encoding="utf-8"))))
    return found


def _studied(
    world: World,
    out: Path,
    method: str,
    seed: int,
    level: float,
    rates: Sequence[float],
    curve: Sequence[int],
    *,
    judge: bool,
    progress: bool,
) -> Found:
    trained: dict[str, Any] = {}
    name = str(world.control)
    if method != CONTROL:
        directory = out / world.name / "models" / f"{method}-seed{seed}"
        model = unlearn(world, method, directory, seed=seed, level=level, progress=progress)
        name = str(model.directory)
        trained = {name: value for name, value in asdict(model).items() if name != "directory"}
    pair = load_pair(world.base, name, progress=False)
    prompts = {kind: load_prompts(path, pair.tokenizer) for kind, path in _files(world).items()}
    case = _case(pair, prompts["forget"], seed)
    curves = relearning(pair.unlearned, case, rates=rates, curve=curve)
    judged = _judged(world, pair, prompts, seed, out, progress=progress) if judge and method != CONTROL else {}
    return Found(
        world=world.name,
        method=method,
        seed=seed,
        **trained,
        base={row["attack"]: row["rank"] for row in unattacked(pair.base, case)},
        curves=curves,
        rounded=rounded(pair.unlearned, case),
        **judged,
    )


def _files(world: World) -> dict[str, Path]:
    files = {"forget": world.forget, "retain": world.retain, "general": world.general}
    return {kind: path for kind, path in files.items() if path is not None}


def _case(pair: ModelPair, forget: Prompts, seed: int) -> Case:
    """Return the case of the attacks. It has no control: the control is attacked as a model of its own."""
    return make_case(pair, forget, control=None, seed=seed).at_most(LIMIT)


def _judged(
    world: World, pair: ModelPair, prompts: Mapping[str, Prompts], seed: int, out: Path, *, progress: bool
) -> dict[str, Any]:
    control: Model | None = resolve_control(pair, world.control)
    found = verdict(
        pair,
        prompts["forget"],
        retain=prompts["retain"],
        general=prompts.get("general"),
        control=control,
        budget="quick",
        seed=seed,
        shared=out / world.name / "shared",
        progress=progress,
    )
    score = found.score
    return {"label": found.label, "score": score.value, "low": score.low, "high": score.high}


def curves_of(found: Sequence[Found]) -> pd.DataFrame:
    """Return one row per model, attack, rate and number of steps."""
    rows = [{"world": f.world, "method": f.method, "seed": f.seed, **row} for f in found for row in f.curves]
    return pd.DataFrame(rows)
