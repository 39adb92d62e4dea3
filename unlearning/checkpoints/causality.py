"""Prove that a model is a decoder: no logit depends on a later token, and every logit is finite."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.errors import InputError

TOLERANCE = 1e-4
"""Largest change of an earlier logit, relative to the largest logit, that counts as rounding (2e-6 is usual)."""
TOLERANCE_HALF = 2e-2
"""The same in half precision."""


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str, *, device: torch.device | None = None) -> None:
    """Check on a few random tokens that a later token changes no earlier logit.

    The configuration does not tell: `is_decoder` is false for BERT, which then sees later tokens, and for GPT-NeoX,
    which never does.

    Args:
        model: The model, in evaluation mode.
        name: Name of the model in messages.
        device: Device of the model's inputs; None for that of its parameters.

    Raises:
        InputError: The model cannot be run, or a logit depends on a later token or is not finite. A model that gives
            other logits at each call is not judged.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, 6), generator=torch.Generator().manual_seed(1)).to(device or model.device)
    changed = ids.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % vocabulary
    try:
        before, after = _logits(model, torch.cat([ids, changed])).chunk(2)
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code, given a stranger's configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{name} ({type(model).__name__}) cannot be run, on random tokens and without any intervention: {reason}; "
            "check its config.json"
        ) from error
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise InputError(
            f"{name}: its logits are not finite, on random tokens and without any intervention; check its weights and "
            "its config.json"
        )
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    gap = float((before[:, :3] - after[:, :3]).abs().max())
    if gap > (TOLERANCE_HALF if half else TOLERANCE) * float(before.abs().max()):
        if not torch.equal(before, _logits(model, torch.cat([ids, changed])).chunk(2)[0]):
            return  # not deterministic, which says nothing of later tokens
        encoder = getattr(model.config, "is_decoder", None) is False
        mend = "; set is_decoder to true in its config.json if it was trained as a decoder" if encoder else ""
        raise InputError(
            f"{name} ({type(model).__name__}) is not a decoder: a later token changes its logits at earlier positions "
            f"by {gap:.2g}{mend or '; use a causal language model'}"
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()
