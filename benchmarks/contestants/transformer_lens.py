"""TransformerLens as its users do it: run_with_cache on the base, run_with_hooks per intervention.

Value vectors are restored by letting the window's parameters point to the base's weights for one forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Krs, Run, batch_by_batch, krs_table
from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch

HOOKS = {"mlp_coef": "blocks.{}.mlp.out.hook_in", "attn_out": "blocks.{}.attn.hook_out"}


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Wrap both models in a TransformerBridge."""
    base, unlearned = pair.base.bridge, pair.unlearned.bridge
    patches = [item for item in interventions if item.kind == "patch"]
    recorded = {HOOKS[site].format(layer) for item in patches for layer in item.window.layers for site in item.sites}

    @batch_by_batch
    @torch.inference_mode()
    def run(batch: Batch) -> Krs:
        batch = batch.to(pair.base.device)
        inputs = {
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "return_type": "logits",
        }

        def scored(logits: Tensor) -> Tensor:
            return logits[batch.rows, batch.columns].float()

        base_logits, cache = base.run_with_cache(
            batch.input_ids, names_filter=recorded.__contains__, output_attentions=False, **inputs
        )

        def from_base(_activation: Tensor, hook: Any) -> Tensor:
            activation: Tensor = cache[hook.name]
            return activation

        def intervened() -> Iterator[Tensor]:
            for item in interventions:
                if item.kind == "patch":
                    names = [HOOKS[site].format(layer) for layer in item.window.layers for site in item.sites]
                    hooks = [(name, from_base) for name in names]
                    yield scored(unlearned.run_with_hooks(batch.input_ids, fwd_hooks=hooks, **inputs))
                else:
                    with ExitStack() as stack:
                        for layer in item.window.layers:
                            ours, theirs = (model.blocks[layer].mlp.out.weight for model in (unlearned, base))
                            stack.enter_context(swapped(ours, theirs))
                        yield scored(unlearned(batch.input_ids, **inputs))

        return krs_table(scored(base_logits), scored(unlearned(batch.input_ids, **inputs)), intervened(), batch)

    return run


@contextmanager
def swapped(ours: Tensor, theirs: Tensor) -> Iterator[None]:
    """Let a parameter hold another one's values, without a copy, and put its own back."""
    own = ours.data
    ours.data = theirs.data
    try:
        yield
    finally:
        ours.data = own
