"""What comes back when the base's MLP coefficients are put into a target: of chosen neurons, or of layers by degrees.

Both at every token position of the same teacher-forced prompt, scored at the answer positions as every patch is:

    neurons    m <- m_b for the chosen neurons, whatever the target computes elsewhere
    scaling    m <- m_t + a (m_b - m_t) in the chosen layers, with m_t and m_b the coefficients of the target's and the
               base's own undisturbed runs: a = 0 changes nothing, a = 1 is the `mlp_coef` patch, a = 2 overshoots
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.coefficients.hooks import coefficients_everywhere, edited_logits
from dissect.coefficients.neurons import NeuronSet
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import (
    LOSS_FLOOR,
    answer_logprob,
    kl_from_base,
    knowledge_recovery_score,
    logit_mse,
    logprob_recovery,
    per_example,
)
from dissect.sweeps.rows import NO_DIFFERENCE
from unlearning.common.errors import InputError

FACTORS = tuple(step / 4 for step in range(9))
"""0, 0.25, ..., 2."""

Row = dict[str, Any]
Advance = Callable[[float], None]


def restore_neurons(
    base: Model,
    targets: Mapping[str, Model],
    prompts: Prompts,
    batch: Batch,
    sets: Sequence[NeuronSet],
    advance: Advance,
) -> Iterator[Row]:
    """Rows of one batch: every set of neurons put back into every target."""
    layers = range(base.n_layers)
    base_logits, given = coefficients_everywhere(base, batch, layers)
    for name, target in targets.items():
        scores = Scores(base_logits, edited_logits(target, batch), prompts, batch, name)
        for neurons in sets:
            chosen = neurons.chosen.to(base.device)

            def put_back(layer: int, own: Tensor, chosen: Tensor = chosen) -> Tensor:
                return torch.where(chosen[layer].to(own.device), given[layer].to(own), own)

            logits = edited_logits(target, batch, put_back, neurons.layers)
            what = {"selection": neurons.selection, "k": neurons.k, "draw": neurons.draw, "factor": 1.0}
            yield from scores.rows(logits, {"intervention": "neurons", **what})
            advance(len(batch.examples))


def scale_layers(
    base: Model,
    targets: Mapping[str, Model],
    prompts: Prompts,
    batch: Batch,
    layers: Sequence[int],
    factors: Sequence[float],
    advance: Advance,
) -> Iterator[Row]:
    """Rows of one batch: these layers' coefficients moved towards the base's by every factor, in every target."""
    base_logits, given = coefficients_everywhere(base, batch, layers)
    what = {"selection": f"layers {layers[0]}-{layers[-1]}", "k": sum(given[layer].shape[-1] for layer in layers)}
    for name, target in targets.items():
        before, own = coefficients_everywhere(target, batch, layers)
        scores = Scores(base_logits, before, prompts, batch, name)
        for factor in factors:

            def scaled(layer: int, now: Tensor, factor: float = factor, own: dict[int, Tensor] = own) -> Tensor:
                # Exact at both ends, and for every factor where the two are the same.
                return torch.lerp(own[layer], given[layer].to(own[layer]), factor).to(now)

            # The first of the layers computes what it did before; with factor 0 so do all.
            logits = before if factor == 0 else edited_logits(target, batch, scaled, layers)
            yield from scores.rows(logits, {"intervention": "scaling", **what, "draw": 0, "factor": factor})
            advance(len(batch.examples))


class Scores:
    """What an intervention on a target is worth, example by example; see `dissect.scoring.recovery`.

    Args:
        base: the base's logits.
        before: the target's before any intervention.
        prompts: where the batch comes from.
        batch: whose scored positions the logits belong to.
        target: the target's word in the table.
    """

    def __init__(
        self,
        base: Float[Tensor, "scored vocab"],
        before: Float[Tensor, "scored vocab"],
        prompts: Prompts,
        batch: Batch,
        target: str,
    ) -> None:
        self._base, self._prompts, self._batch, self._target = base, prompts, batch, target
        self._rows, self._next = batch.rows.to(base.device), batch.next_tokens.to(base.device)
        self._base_logprobs = base.log_softmax(-1)
        self._before_logprobs = before.to(base.device).log_softmax(-1)
        self._base_logprob = self._mean(answer_logprob(self._base_logprobs, self._next))
        self._before = self._losses(before)

    def rows(self, intervened: Float[Tensor, "scored vocab"], what: Row) -> Iterator[Row]:
        """A row per example; `what` names the intervention.

        Raises:
            InputError: logits that are not finite.
        """
        before, after = self._before, self._losses(intervened)
        krs = knowledge_recovery_score(after["loss"], before["loss"])
        logprob = logprob_recovery(after["logprob"], before["logprob"], self._base_logprob)
        kl = knowledge_recovery_score(after["kl"], before["kl"])
        for row, example in enumerate(self._batch.examples):
            item = self._prompts.items[example]
            yield {
                "target": self._target,
                **what,
                "example": item.id,
                "example_index": example,
                "group": item.group,
                "n_answer_tokens": item.n_answer_tokens,
                "loss_unlearned": before["loss"][row].item(),
                "loss_intervened": after["loss"][row].item(),
                "krs": krs[row].item(),
                "logprob_recovery": logprob[row].item(),
                "kl_recovery": kl[row].item(),
                "logprob_base": self._base_logprob[row].item(),
                "logprob_unlearned": before["logprob"][row].item(),
                "logprob_intervened": after["logprob"][row].item(),
                "kl_unlearned": before["kl"][row].item(),
                "kl_intervened": after["kl"][row].item(),
                "kl_own": after["kl_own"][row].item(),
                "undefined": "" if before["loss"][row] > LOSS_FLOOR else NO_DIFFERENCE,
            }

    def _losses(self, logits: Float[Tensor, "scored vocab"]) -> dict[str, Tensor]:
        logits = logits.to(self._base.device)
        logprobs = logits.log_softmax(-1)
        loss = logit_mse(self._base, logits)
        if not torch.isfinite(loss).all():
            raise InputError(f"the {self._target} model gives logits that are not finite; is the checkpoint sound?")
        per_position = {
            "loss": loss,
            "logprob": answer_logprob(logprobs, self._next),
            "kl": kl_from_base(self._base_logprobs, logprobs),
            "kl_own": kl_from_base(self._before_logprobs, logprobs),
        }
        return {name: self._mean(values) for name, values in per_position.items()}

    def _mean(self, values: Tensor) -> Tensor:
        return per_example(values, self._rows, len(self._batch.examples)).cpu()
