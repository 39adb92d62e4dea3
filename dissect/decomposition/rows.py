"""Rows of a decomposition's tables, from the logits and measures of one batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.decomposition.terms import Recorded
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
from dissect.sweeps.rows import NO_DIFFERENCE
from unlearning.common.errors import InputError

NO_CHANGE = "the output is the same in base and target: nothing to share out"


@dataclass(frozen=True, eq=False)
class Scorer:
    """Losses of any logits of one batch against the base's, per example."""

    base: Float[Tensor, "scored vocab"]
    base_logprobs: Float[Tensor, "scored vocab"]
    batch: Batch

    @classmethod
    def of(cls, base: Recorded, batch: Batch) -> "Scorer":
        return cls(base.logits, base.logits.log_softmax(-1), batch)

    def __call__(self, logits: Float[Tensor, "scored vocab"], what: str) -> dict[str, Float[np.ndarray, " example"]]:
        logprobs = logits.log_softmax(-1)
        per_position = {
            "loss": logit_mse(self.base, logits),
            "centred_loss": centred_logit_mse(self.base, logits),
            "logprob": answer_logprob(logprobs, self.batch.next_tokens),
            "logprob_base": answer_logprob(self.base_logprobs, self.batch.next_tokens),
            "kl": kl_from_base(self.base_logprobs, logprobs),
        }
        if not torch.isfinite(per_position["loss"]).all():  # as soon as one logit is not
            raise InputError(f"{what} gives logits that are not finite; is the checkpoint sound?")
        return {name: _mean(values, self.batch) for name, values in per_position.items()}


def _mean(values: Float[Tensor, " scored"], batch: Batch) -> Float[np.ndarray, " example"]:
    return per_example(values, batch.rows, len(batch.examples)).cpu().numpy()


def example_rows(
    where: dict[str, Any],
    batch: Batch,
    measures: dict[str, Tensor],
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    problem: str,
    prompts: Prompts,
) -> pd.DataFrame:
    items = [prompts.items[example] for example in batch.examples]
    means = {name: _mean(values, batch) for name, values in measures.items()}
    loss, kl = (
        knowledge_recovery_score(torch.from_numpy(after[score]), torch.from_numpy(before[score])).numpy()
        for score in ("loss", "kl")
    )
    logprob = logprob_recovery(
        *(torch.from_numpy(values) for values in (after["logprob"], before["logprob"], before["logprob_base"]))
    ).numpy()
    return pd.DataFrame(
        {
            **where,
            "example": [item.id for item in items],
            "example_index": list(batch.examples),
            "group": [item.group for item in items],
            "n_answer_tokens": [item.n_answer_tokens for item in items],
            **means,
            "loss_unlearned": before["loss"],
            "loss_intervened": after["loss"],
            "krs": loss,
            "logprob_recovery": logprob,
            "kl_recovery": kl,
            "centred_loss_unlearned": before["centred_loss"],
            "centred_loss_intervened": after["centred_loss"],
            "logprob_base": before["logprob_base"],
            "logprob_unlearned": before["logprob"],
            "logprob_intervened": after["logprob"],
            "kl_unlearned": before["kl"],
            "kl_intervened": after["kl"],
            "undefined": np.where(before["loss"] > LOSS_FLOOR, "", NO_DIFFERENCE),
            "share_undefined": np.where(np.isnan(means["share"]), NO_CHANGE, ""),
            "direct_undefined": problem,
        }
    )


def position_rows(where: dict[str, Any], batch: Batch, measures: dict[str, Tensor], prompts: Prompts) -> pd.DataFrame:
    rows = batch.rows.cpu().numpy()
    first = np.searchsorted(rows, rows)  # positions of one example are neighbours
    indices = [batch.examples[row] for row in rows]
    kept = ("norm", "base_norm", "share", "direct", "direct_centred")
    return pd.DataFrame(
        {
            **where,
            "example": [prompts.items[index].id for index in indices],
            "example_index": indices,
            "position": np.arange(len(rows)) - first,
            "token": batch.next_tokens.cpu().numpy(),
            **{name: measures[name].cpu().numpy() for name in kept},
        }
    )
