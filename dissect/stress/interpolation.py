"""Moving the weights back towards the base by small steps: W(t) = W + t (W_base - W).

At t = 1 every model is the base, so this puts knowledge in, more with every step. A never model moved by the same t
says how much: it starts from the same trunk, and gets the same share of what it lacks. Where the unlearned model gains
before the never model gains anything, what is left in its weights meets the little that comes in: the two are on one
ridge, as they are where training nudged the knowledge aside and did not take it out. That its weights alone hold the
facts is not shown, since t (W_base - W) is the base's and not the model's own.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dissect.models.model import Model
from dissect.models.parameter_swap import with_values
from dissect.stress.core.case import Case
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError

STEPS = (0.05, 0.1, 0.2)
"""Shares of the way to the base; at 0.3 the built-in never model already has most of what it lacked."""

PROVES = (
    "The attack takes weights from the base, a share t of all that differs. Above zero: that share brings more back in "
    "the unlearned model than in one that never knew, so the machinery is near; not that its weights hold the facts. "
    "Zero: the facts are no nearer than in a model that never knew them."
)


def interpolation(case: Case, *, steps: Sequence[float] = STEPS) -> StressResult:
    """Move every model's weights towards the base's, and ask the facts; one variant for each step.

    Args:
        case: models and facts.
        steps: t, above 0 and below 1.

    Returns:
        With the table `curve`: `role`, `t` and the mean of each measure, and for t = 1 the base itself.

    Raises:
        InputError: no step, one twice, or one that is not above 0 and below 1.
    """
    started = time.perf_counter()
    steps = sorted(steps)
    if not steps or len({_variant(t) for t in steps}) < len(steps) or not 0 < steps[0] <= steps[-1] < 1:
        given = ", ".join(f"{t:g}" for t in steps) or "none"
        raise InputError(f"steps towards the base: {given}; give different shares above 0 and below 1")
    base = case.pair.base
    scored: list[tuple[str, str, FactScores]] = []
    points = []
    ends = score_facts(base, case.forget, batch_size=case.batch_size)
    for role, model in case.models.items():
        if role == "base":  # which goes nowhere
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
        floors={},  # without a never model nothing tells what came from the base
        seed=case.seed,
        tables={"curve": pd.DataFrame(points)},
    )


@torch.no_grad()
def moved(model: Model, base: Model, t: float) -> Model:
    """The model with all its weights moved a share t of the way to the base's; both stay as they are."""
    values: dict[str, Tensor] = {}
    done: dict[tuple[int, int], Tensor] = {}
    for name, ours in model.hf.named_parameters(remove_duplicate=False):
        theirs = base.hf.get_parameter(name)
        tied = (id(ours), id(theirs))  # a weight under two names is moved once, and stays one
        if tied not in done:
            done[tied] = torch.lerp(ours.data, theirs.data.to(ours), t)
        values[name] = done[tied]
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} t {t!r} to {base.sha256}")


def _variant(t: float) -> str:
    return f"t {t:g}"
