"""The released notebooks' protocol (2410.06606) in plain PyTorch.

Hooks record every base activation; then one full forward of the unlearned model per window and site, with hooks that
replace, and logits at all positions. Value vectors are restored by copying the base's weights into the window and
loading the whole unlearned state dict again afterwards (from memory: the notebooks read it from disk).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.contestants import Krs, Run, batch_by_batch, krs_table
from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch

Place = tuple[str, int]
"""A site and a layer."""


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Keep a copy of the unlearned state dict in memory, as the file that the notebooks load again."""
    base, unlearned = pair.base.hf, pair.unlearned.hf
    checkpoint = {name: tensor.clone() for name, tensor in unlearned.state_dict().items()}
    patches = [item for item in interventions if item.kind == "patch"]
    places = sorted({(site, layer) for item in patches for layer in item.window.layers for site in item.sites})

    @batch_by_batch
    @torch.inference_mode()
    def run(batch: Batch) -> Krs:
        batch = batch.to(pair.base.device)
        donor: dict[Place, Tensor] = {}

        def intervened() -> Iterator[Tensor]:
            for item in interventions:
                if item.kind == "patch":
                    replaced = [(site, layer) for layer in item.window.layers for site in item.sites]
                    yield _forward(unlearned, batch, replaced, lambda place, _activation: donor[place])
                else:
                    for layer in item.window.layers:
                        _down_proj(unlearned, layer).weight.copy_(_down_proj(base, layer).weight)
                    yield _forward(unlearned, batch)
                    unlearned.load_state_dict(checkpoint)

        base_logits = _forward(base, batch, places, donor.__setitem__)
        return krs_table(base_logits, _forward(unlearned, batch), intervened(), batch)

    return run


def _forward(
    model: PreTrainedModel,
    batch: Batch,
    places: Sequence[Place] = (),
    act: Callable[[Place, Tensor], Tensor | None] = lambda _place, _activation: None,
) -> Tensor:
    """Logits at the scored positions, out of logits at all; `act` sees each place's activation and may replace it."""
    handles = [_hook(model, place, act) for place in places]
    try:
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[batch.rows, batch.columns].float()


def _hook(
    model: PreTrainedModel, place: Place, act: Callable[[Place, Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    site, layer = place
    if site == "mlp_coef":
        return _down_proj(model, layer).register_forward_pre_hook(lambda _module, args: act(place, args[0]))
    assert site == "attn_out", site
    attention = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
    return attention.register_forward_hook(lambda _module, _args, output: act(place, output))


def _down_proj(model: PreTrainedModel, layer: int) -> nn.Linear:
    module = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    assert isinstance(module, nn.Linear)
    return module
