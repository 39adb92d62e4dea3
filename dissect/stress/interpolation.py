"""Move the weights back towards the base in small steps: W(t) = W + t (W_base - W).

At t = 1 every model is the base, so this attack puts knowledge in, more with every step. The control moved by the same
t shows how much: it comes from the same pretrained model and gets the same share of what it lacks. If the unlearned
model gains before the control gains anything, what is left in its weights adds to the little that comes in. This is
expected where training nudged the knowledge aside without removing it. The test does not show that the model's weights
alone hold the facts, because t (W_base - W) comes from the base.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.stress.core.case import Case
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError

STEPS = (0.05, 0.1, 0.2)
"""Shares of the way to the base; at 0.3 the built-in control already has most of what it lacked."""

PROVES = (
    "The attack moves the weights a share t of the way to the base's. rho > 0: the same share brings back more in "
    "the unlearned model than in the control, so the machinery is close to intact; it does not show that the "
    "model's own weights hold the facts. rho = 0: the facts are no closer than in the control."
)


def interpolation(case: Case, *, steps: Sequence[float] = STEPS) -> StressResult:
    """Move every model's weights towards the base's; one variant per step.

    Args:
        case: Models and facts.
        steps: Values of t, above 0 and below 1.

    Returns:
        The result of the test `interpolation`, with the table `curve`: `role`, `t` and the mean of each measure; t = 1
        is the base itself.

    Raises:
        InputError: There is no step, a step is given twice, or a step is not above 0 and below 1.
    """
    started = time.perf_counter()
    steps = sorted(steps)
    if not steps or len({_variant(t) for t in steps}) < len(steps) or not 0 < steps[0] <= steps[-1] < 1:
        given = ", ".join(f"{t:g}" for t in steps) or "none"
        raise InputError(f"`steps` must be different shares above 0 and below 1, got {given}")
    base = case.pair.base
    scored: list[tuple[str, str, FactScores]] = []
    points = []
    ends = score_facts(base, case.forget, batch_size=case.batch_size)
    for role, model in case.models.items():
        if role == "base":  # the base is not moved
            scored.append((role, PLAIN, ends))
            continue
        found = {0.0: score_facts(model, case.forget, batch_size=case.batch_size)}
        scored.append((role, PLAIN, found[0.0]))
        for t in steps:
            found[t] = score_facts(moved(model, base, t), case.forget, batch_size=case.batch_size)
            scored.append((role, _variant(t), found[t]))
        for t, scores in (found | {1.0: ends}).items():
            means = {name: float(np.nanmean(values)) for name, values in scores.columns().items()}
            points.append({"role": role, "t": t, **means})
    return StressResult(
        test="interpolation",
        level=2,
        measure=MEASURES[0],
        frame=fact_rows(case.forget, scored),
        proves=PROVES,
        settings={"steps": steps},
        seconds=time.perf_counter() - started,
        floors={},  # no floor without a control: only a control shows how much the base's weights bring in
        seed=case.seed,
        tables={"curve": pd.DataFrame(points)},
    )


@torch.no_grad()
def moved(model: Model, base: Model, t: float) -> Model:
    """Return the model with all its weights moved a share t of the way to the base's; both models stay unchanged.

    Args:
        model: The model to move.
        base: The model to move towards.
        t: Share of the way.

    Returns:
        The moved model.
    """
    values: dict[str, Tensor] = {}
    done: dict[tuple[int, int], Tensor] = {}
    for name, ours in model.hf.named_parameters(remove_duplicate=False):
        theirs = base.hf.get_parameter(name)
        tied = (id(ours), id(theirs))  # a weight under two names is moved once and stays tied
        if tied not in done:
            done[tied] = torch.lerp(ours.data, theirs.data.to(ours), t)
        values[name] = done[tied]
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} t {t!r} to {base.sha256}")


def _variant(t: float) -> str:
    return f"t {t:g}"
