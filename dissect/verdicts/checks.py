"""What a verdict's models and facts must be like: checked before anything is attacked, or after the first test."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from dissect.models.model import Model
from dissect.models.pair import load_like
from dissect.stress.core.case import Case, control_role
from dissect.stress.core.result import StressResult
from dissect.stress.core.scores import RANK_FLOOR
from dissect.stress.deranged import DERANGEMENTS, deranged_lessons, deranged_relearning
from dissect.verdicts.rule import Rule
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.errors import InputError

KNOWS = 0.5
"""A control that scores more than this share of what the base scores above chance is refused."""

SAME_START = 0.3
"""A control whose weights have a lower cosine with the base's (`shared_basis`) is refused.

Measured: .94 for `demo:never` with `demo:base` and for `demo-neox:never` with `demo-neox:base`; below .02 for every
matrix of a model with fresh random weights.
"""

DERANGED = deranged_relearning.__name__
"""Name of the test that does without a control."""


def with_strangers(case: Case, strangers: Sequence[str | Model]) -> Case:
    """Return the case with the strangers, loaded and checked.

    Args:
        case: Models and facts.
        strangers: Other language models, loaded or by name or path.

    Returns:
        The case; the same one without strangers.

    Raises:
        InputError: There is a control, a stranger is the base or the unlearned model, or it is streamed.
    """
    if not strangers:
        return case
    if case.control is not None:
        raise InputError(
            "`strangers` must be given without a control, got both: with a control, the floor is what the control "
            "scores. Give one or the other"
        )
    loaded = tuple(load_like(one, case.pair.base) if isinstance(one, str) else one for one in strangers)
    for stranger in loaded:
        if stranger.sha256 in (case.pair.base.sha256, case.pair.unlearned.sha256):
            raise InputError(
                f"`strangers` must never have read about the subjects, got {stranger.name}, which is the base or the "
                "unlearned model. Give other language models"
            )
        if stranger.streamed is not None:
            raise InputError(
                f"`strangers` must be in memory, but {stranger.name} is streamed. Load it with stream=False"
            )
    return replace(case, strangers=loaded)


def check_without_attack(result: StressResult, case: Case) -> None:
    """Check that the base knows the forget facts, and that the control does not.

    Args:
        result: Result of `dissect.stress.without_attack`.
        case: Models and facts.

    Raises:
        InputError: The base does not know the facts, or the control does.
    """
    means = result.frame.groupby(["measure", "role"])["value"].mean()
    base_rank = result.frame.query("measure == 'rank' and role == 'base'").sort_values("example_index")
    if not _above_chance(base_rank):
        raise InputError(
            f"`base` must know the forget facts, but {case.pair.base.name} ranks the right answer above only "
            f"{means['rank', 'base']:.0%} of the distractors (chance is 50 %): there is nothing to unlearn. Give the "
            "model that knows the facts as `base`"
        )
    for number, control in enumerate(case.controls):
        shares = [
            (means[measure, control_role(number)] - chance) / (means[measure, "base"] - chance)
            for measure, chance in (("rank", RANK_FLOOR), ("probability", 0.0))
        ]
        if min(shares) > KNOWS:
            raise InputError(
                f"`control` must not know the forget facts, but {control.name} gives their answers {shares[1]:.0%} of "
                "the base's probability. Give a model that was never trained on them as `control`, or none"
            )


def check_derangement(case: Case, rule: Rule) -> None:
    """Check that the answers can be deranged, if there is no control and the rule rests on deranged relearning.

    Where they cannot, such as where most questions of a kind have one answer, a model without the knowledge need not be
    at chance either, so that no other test could decide without a control.

    Args:
        case: Models and facts.
        rule: The rule.

    Raises:
        InputError: The rule needs deranged relearning, and there are too few groups, or no answers that can be deranged
            and compared.
    """
    if case.control is not None or DERANGED not in {entry.test for entry in rule.needed}:
        return
    try:
        deranged_lessons(case.forget.prompts, DERANGEMENTS, case.pair.tokenizer, seed=case.seed)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}, or a `control`, with which other tests decide") from None


def check_same_start(case: Case) -> None:
    """Check that the controls come from the base's pretrained model.

    Args:
        case: Models and facts.

    Raises:
        InputError: A control shares no basis with the base.
    """
    for control in case.controls:
        cosine = shared_basis(case.pair.base, control)
        if cosine < SAME_START:
            raise InputError(
                f"`control` must come from the base's pretrained model, but the weights of {control.name} point "
                f"elsewhere than those of {case.pair.base.name} (cosine {cosine:.2f}; above .9 for a model that was "
                "fine-tuned from the same start, 0 for another initialisation). Give a model that was fine-tuned from "
                "the same pretrained model, or none"
            )


@torch.no_grad()
def shared_basis(base: Model, other: Model) -> float:
    """Return how far the weights of two models point the same way.

    Args:
        base: A model.
        other: A model of the same architecture.

    Returns:
        The cosine of the input embeddings, or the median cosine of all matrices if that is higher: neurons and heads
        that are merely in another order change the latter only.
    """
    cosines = []
    embedding = base.hf.get_input_embeddings().weight
    of_embedding = -1.0
    for name, ours in base.hf.named_parameters():
        if ours.dim() < 2:
            continue
        theirs = other.hf.get_parameter(name)
        cosine = float(torch.cosine_similarity(ours.flatten().float(), theirs.to(ours).flatten().float(), dim=0))
        cosines.append(cosine)
        if ours is embedding:
            of_embedding = cosine
    return max(of_embedding, float(np.median(cosines)))


def _above_chance(rows: pd.DataFrame) -> bool:
    """Return whether the lower end of the mean rank is above chance; without an interval, whether the mean is."""
    found = Bootstrap(rows["group"].tolist()).mean(rows["value"].to_numpy(dtype=np.float64))
    return (found.low if np.isfinite(found.low) else found.value) > RANK_FLOOR
