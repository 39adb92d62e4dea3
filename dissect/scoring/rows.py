"""The recovery columns of a results table, from the logits of one batch."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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

Extra = Literal["centred_loss", "kl_own"]
"""A loss beside the usual ones: the MSE of centred logits, or KL(target before || intervened)."""

Columns = dict[str, Any]
"""Values by column name, each of shape [example]."""


class RecoveryScorer:
    """Recovery columns of one batch, from logits at its scored positions (see `dissect.scoring.recovery`).

    Args:
        base: Logits of the base model.
        target: Logits of the target before any intervention.
        batch: The batch that the logits belong to.
        name: The target's name in error messages.
        extra: The loss that is reported beside MSE, log-probability and KL.

    Raises:
        InputError: The target's logits are not finite.
    """

    def __init__(
        self,
        base: Float[Tensor, "scored vocab"],
        target: Float[Tensor, "scored vocab"],
        batch: Batch,
        *,
        name: str,
        extra: Extra = "centred_loss",
    ) -> None:
        self._base, self._name, self._extra = base, name, extra
        self._rows, self._next = batch.rows.to(base.device), batch.next_tokens.to(base.device)
        self._n_examples = len(batch.examples)
        self._base_logprobs = base.log_softmax(-1)
        self._base_logprob = self._mean(answer_logprob(self._base_logprobs, self._next))
        self._target_logprobs = target.to(base.device).log_softmax(-1) if extra == "kl_own" else None
        self._before = self._losses(target, "its own logits, without any intervention, are")

    def columns(self, intervened: Float[Tensor, "scored vocab"], what: str) -> Columns:
        """Compute the recovery columns of one intervention.

        Args:
            intervened: Logits of the target under the intervention.
            what: The intervention's name in error messages.

        Returns:
            Losses before and after, recovery scores (NaN where undefined), and `undefined`, the reason or "";
            float64, in the order of the batch's examples.

        Raises:
            InputError: The logits are not finite.
        """
        before, after = self._before, self._losses(intervened, f"{what} gives logits that are")
        columns = {
            "loss_unlearned": before["loss"],
            "loss_intervened": after["loss"],
            "krs": knowledge_recovery_score(after["loss"], before["loss"]),
            "logprob_recovery": logprob_recovery(after["logprob"], before["logprob"], self._base_logprob),
            "kl_recovery": knowledge_recovery_score(after["kl"], before["kl"]),
        }
        if self._extra == "centred_loss":
            columns["centred_loss_unlearned"] = before["centred_loss"]
            columns["centred_loss_intervened"] = after["centred_loss"]
        columns |= {
            "logprob_base": self._base_logprob,
            "logprob_unlearned": before["logprob"],
            "logprob_intervened": after["logprob"],
            "kl_unlearned": before["kl"],
            "kl_intervened": after["kl"],
        }
        if self._extra == "kl_own":
            columns["kl_own"] = after["kl_own"]
        undefined = np.where(before["loss"].numpy() > LOSS_FLOOR, "", NO_DIFFERENCE)
        return {name: values.numpy() for name, values in columns.items()} | {"undefined": undefined}

    def _losses(self, logits: Tensor, what: str) -> dict[str, Float[Tensor, " example"]]:
        logits = logits.to(self._base.device)
        logprobs = logits.log_softmax(-1)
        per_position = {
            "loss": logit_mse(self._base, logits),
            "logprob": answer_logprob(logprobs, self._next),
            "kl": kl_from_base(self._base_logprobs, logprobs),
        }
        if not torch.isfinite(per_position["loss"]).all():  # not finite as soon as one logit is not
            raise InputError(f"{self._name}: {what} not finite; is the checkpoint sound?")
        if self._target_logprobs is not None:
            per_position["kl_own"] = kl_from_base(self._target_logprobs, logprobs)
        else:
            per_position["centred_loss"] = centred_logit_mse(self._base, logits)
        return {name: self._mean(values) for name, values in per_position.items()}

    def _mean(self, values: Float[Tensor, " scored"]) -> Float[Tensor, " example"]:
        return per_example(values, self._rows, self._n_examples).cpu()


def example_columns(prompts: Prompts, batch: Batch) -> Columns:
    """Return the columns that identify the examples of a batch.

    Args:
        prompts: The prompts that the batch was made from.
        batch: The batch.

    Returns:
        `example` (id), `example_index`, `group` and `n_answer_tokens`, in the order of the batch's examples.
    """
    items = [prompts.items[index] for index in batch.examples]
    return {
        "example": [item.id for item in items],
        "example_index": list(batch.examples),
        "group": [item.group for item in items],
        "n_answer_tokens": [item.n_answer_tokens for item in items],
    }


def as_rows(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one dictionary of plain Python values for each example."""
    values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
    for row in zip(*values, strict=True):
        yield dict(zip(columns, row, strict=True))
