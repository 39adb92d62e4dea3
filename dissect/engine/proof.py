"""Prove on one row of a sweep what its numbers rest on, with the Hugging Face models themselves.

Both proofs take a forward pass or two of one example, little beside a sweep's hundreds. They need models in memory.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.parameter_swap import restored_values
from dissect.prompts.prompts import Batch
from dissect.scoring.forward import scored_logits
from unlearning.common.errors import InputError

_TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: far more than rounding, far less than an error."""


def prove_taken_apart(model: Model, batch: Batch, logits: Float[Tensor, "scored vocab"]) -> None:
    """Check that logits computed block by block are those of the model as a whole.

    The median over the positions counts: in a mixture of experts rounding may send single tokens to other experts.
    Half precision rounds too much to be checked.

    Args:
        model: The model.
        batch: The batch that was read.
        logits: What was computed for it.

    Raises:
        InputError: The logits differ.
    """
    if model.streamed is not None or logits.dtype not in (torch.float32, torch.float64) or "float16" in model.dtype:
        return
    whole = scored_logits(model, batch.pieces(1)[0])
    gaps = (logits[(batch.rows == 0).to(logits.device)].to(whole.device) - whole).abs().amax(-1)
    if not float(gaps.median()) <= _TOLERANCE * max(1.0, float(whole.abs().max())):
        raise InputError(
            f"`engine` must be 'reference' for {model.name}, got 'wavefront': computed block by block, its logits "
            f"differ by {float(gaps.median()):.2g}"
        )


def prove_weights_only(donor: Model, targets: Sequence[Model], batch: Batch) -> None:
    """Check that a target with all of the donor's weights is the donor, to the bit: nothing else tells them apart.

    Args:
        donor: Source of the weights.
        targets: Models that are intervened on.
        batch: Any batch of the sweep.

    Raises:
        InputError: A target differs from the donor in more than its parameters.
    """
    if donor.streamed is not None:
        return
    row = batch.pieces(1)[0]
    expected = scored_logits(donor, row)
    for target in targets:
        everything = dict.fromkeys(target.weights.all_names)
        hf = with_values(target.hf, restored_values(target.hf, donor.hf, everything))
        if not torch.equal(scored_logits(replace(target, hf=hf), row), expected):
            raise InputError(
                f"{target.name} with all weights of {donor.name} is not {donor.name}: the two differ in buffers, or in "
                "a field of config.json that changes what is computed; use a pair that differs in weights only"
            )
