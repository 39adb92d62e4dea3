"""nnsight as its documentation shows it: save in one trace, assign in another, one trace per intervention.

Value vectors are restored by letting the window's parameters point to the base's weights for one trace.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.contestants import Krs, Run, batch_by_batch, krs_table
from benchmarks.contestants.transformer_lens import swapped
from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Wrap both models; nnsight hooks into the modules, so it gets module trees of its own."""
    base, unlearned = (NNsight(_own_tree(model.hf)) for model in (pair.base, pair.unlearned))
    n_layers = len(base.model.layers)

    @batch_by_batch
    @torch.inference_mode()
    def run(batch: Batch) -> Krs:
        batch = batch.to(pair.base.device)
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }

        def scored(logits: Tensor) -> Tensor:
            return logits[batch.rows, batch.columns].float()

        attn_out, mlp_coef = {}, {}
        with base.trace(**inputs):
            for layer in range(n_layers):
                attn_out[layer] = base.model.layers[layer].self_attn.o_proj.output.save()
                mlp_coef[layer] = base.model.layers[layer].mlp.down_proj.input.save()
            base_logits = base.output.logits.save()

        def plain() -> Tensor:
            with unlearned.trace(**inputs):
                logits = unlearned.output.logits.save()
            return scored(logits)

        def patched(item: Intervention) -> Tensor:
            with unlearned.trace(**inputs):
                for layer in item.window.layers:
                    if "attn_out" in item.sites:
                        unlearned.model.layers[layer].self_attn.o_proj.output = attn_out[layer]
                    if "mlp_coef" in item.sites:
                        unlearned.model.layers[layer].mlp.down_proj.input = mlp_coef[layer]
                logits = unlearned.output.logits.save()
            return scored(logits)

        def intervened() -> Iterator[Tensor]:
            for item in interventions:
                if item.kind == "patch":
                    yield patched(item)
                else:
                    with ExitStack() as stack:
                        for layer in item.window.layers:
                            ours, theirs = (m.hf.model.layers[layer] for m in (pair.unlearned, pair.base))
                            stack.enter_context(swapped(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight))
                        yield plain()

        return krs_table(scored(base_logits), plain(), intervened(), batch)

    return run


def _own_tree(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the module tree that shares the parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))
