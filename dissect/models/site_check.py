"""Proof that a model's sites can be patched."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dissect.models.sites import SITES
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.model import Model


def check_sites(model: "Model") -> dict[str, str]:
    """Prove that every site works on this model, in one plain and one self-patched forward.

    Each site must fire exactly once in every layer, with the shape [batch, position, width], and a model patched
    with its own activations must give the same logits to the bit.

    Returns:
        The sites that this architecture does not offer, with the reason.

    Raises:
        InputError: patching the model with its own activations changes its logits.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.hf.config.get_text_config().vocab_size, (2, 6), generator=generator).to(model.device)
    bridge, config = model.bridge, model.bridge.cfg
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "return_type": "logits"}
    points = {site.hook_name(layer): site for site in SITES.values() for layer in range(model.n_layers)}
    known = bridge.hook_dict
    fired: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Tensor] = {}

    def record(activation: Tensor, hook: Any) -> None:
        fired[hook.name] += 1
        shapes[hook.name] = tuple(activation.shape)
        kept[hook.name] = activation.clone()

    def replace(_activation: Tensor, hook: Any) -> Tensor:
        return kept[hook.name]

    present = [point for point in points if point in known]
    with torch.inference_mode():
        plain = bridge.run_with_hooks(ids, fwd_hooks=[(point, record) for point in present], **inputs)
    missing: dict[str, str] = {}
    for point, site in points.items():
        width = config.d_mlp if site.width == "d_mlp" else config.d_model
        if point not in known:
            missing.setdefault(site.name, f"its blocks have no {point}")
        elif fired[point] != 1:
            missing.setdefault(site.name, f"{point} fired {fired[point]} times in one forward")
        elif shapes[point] != (2, 6, width):
            missing.setdefault(site.name, f"{point} has shape {shapes[point]}, expected (2, 6, {width})")
    working = [point for point in present if points[point].name not in missing]
    with torch.inference_mode():
        patched = bridge.run_with_hooks(ids, fwd_hooks=[(point, replace) for point in working], **inputs)
    if not torch.equal(plain, patched):
        gap = float((plain - patched).abs().max())
        raise InputError(
            f"{model.name}: patching it with its own activations changes its logits by {gap:.2g}; "
            "its sites cannot be trusted, so nothing was computed"
        )
    return missing
