"""Rows of the results table, from the logits of a sweep."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dissect.engine import Sweep
from dissect.interventions.arms import Arm
from dissect.interventions.intervention import Intervention
from dissect.models.sites import site_label
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import (
    LOSS_FLOOR,
    answer_logprob,
    centred_logit_mse,
    kl_from_base,
    knowledge_recovery_score,
    logit_mse,
    logprob_recovery,
    per_example,
)
from unlearning.common.errors import InputError

NO_DIFFERENCE = "base and target give the same logits: nothing to recover"


def score_sweep(
    sweep: Sweep,
    prompts: Prompts,
    batch: Batch,
    interventions: Sequence[Intervention],
    *,
    arm: Arm,
    model_name: str,
) -> Iterator[dict[str, Any]]:
    """Rows of one batch, example by example within each intervention.

    Raises:
        InputError: logits that are not finite.
    """
    rows, next_tokens = batch.rows.to(sweep.base.device), batch.next_tokens.to(sweep.base.device)
    n = len(batch.examples)
    base_logprobs = sweep.base.log_softmax(-1)

    def losses(scored: Tensor, what: str) -> dict[str, Tensor]:
        logprobs = scored.log_softmax(-1)
        per_position = {
            "loss": logit_mse(sweep.base, scored),
            "centred_loss": centred_logit_mse(sweep.base, scored),
            "logprob": answer_logprob(logprobs, next_tokens),
            "kl": kl_from_base(base_logprobs, logprobs),
        }
        if not torch.isfinite(per_position["loss"]).all():  # as soon as one logit is not
            raise InputError(f"{model_name}: {what} gives logits that are not finite; is the checkpoint sound?")
        return {name: per_example(values, rows, n).cpu() for name, values in per_position.items()}

    base_logprob = per_example(answer_logprob(base_logprobs, next_tokens), rows, n).cpu()
    before = losses(sweep.target, "no intervention")
    for intervention, scored in zip(interventions, sweep.intervened, strict=True):
        after = losses(scored, intervention.label)
        krs = knowledge_recovery_score(after["loss"], before["loss"])
        logprob = logprob_recovery(after["logprob"], before["logprob"], base_logprob)
        kl = knowledge_recovery_score(after["kl"], before["kl"])
        for row, example in enumerate(batch.examples):
            item = prompts.items[example]
            yield {
                "arm": arm.name,
                "target": arm.target,
                "donor": arm.donor,
                "kind": intervention.kind,
                "site": site_label(intervention.sites),
                "window": intervention.window.kind,
                "centre": intervention.window.centre,
                "first_layer": intervention.window.first,
                "last_layer": intervention.window.last,
                "example": item.id,
                "example_index": example,
                "group": item.group,
                "n_answer_tokens": item.n_answer_tokens,
                "loss_unlearned": before["loss"][row].item(),
                "loss_intervened": after["loss"][row].item(),
                "krs": krs[row].item(),
                "logprob_recovery": logprob[row].item(),
                "kl_recovery": kl[row].item(),
                "centred_loss_unlearned": before["centred_loss"][row].item(),
                "centred_loss_intervened": after["centred_loss"][row].item(),
                "logprob_base": base_logprob[row].item(),
                "logprob_unlearned": before["logprob"][row].item(),
                "logprob_intervened": after["logprob"][row].item(),
                "kl_unlearned": before["kl"][row].item(),
                "kl_intervened": after["kl"][row].item(),
                "undefined": "" if before["loss"][row] > LOSS_FLOOR else NO_DIFFERENCE,
            }
