"""What only the reference engine does: it lets hooks run, and keeps activations by TransformerLens' names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dissect.engine.reference import hook_points, record, scored_logits
from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.models.sites import SITES
from tests.dissect.helpers import build_batch, build_pair, torch_state


def test_hook_points_are_those_of_every_layer_of_the_window_and_none_for_weights() -> None:
    intervention = Intervention(("mlp_coef", "resid_post", "value_vectors"), Window(1, (0, 1)))
    assert hook_points(intervention) == [
        "blocks.0.mlp.out.hook_in",
        "blocks.0.hook_out",
        "blocks.1.mlp.out.hook_in",
        "blocks.1.hook_out",
    ]


def test_no_hook_outlives_an_exception_in_a_hook(tmp_path: Path) -> None:
    model, batch = build_pair("neox").unlearned, build_batch(tmp_path, "right")
    before, plain = torch_state(model), scored_logits(model, batch, [])
    ran = []

    def zero(activation: Tensor, hook: Any) -> Tensor:
        ran.append(hook.name)
        return torch.zeros_like(activation)

    def fail(_activation: Tensor, hook: Any) -> Tensor:
        raise RuntimeError(f"in {hook.name}")

    early, late = SITES["mlp_coef"].hook_name(0), SITES["mlp_coef"].hook_name(1)
    with pytest.raises(RuntimeError, match="in blocks.1"):
        scored_logits(model, batch, [(early, zero), (late, fail)])
    assert ran == [early]
    assert torch_state(model) == before
    assert torch.equal(scored_logits(model, batch, []), plain)


def test_recorded_activations_are_copies_that_later_code_cannot_overwrite(tmp_path: Path) -> None:
    model, batch = build_pair("llama").base, build_batch(tmp_path, "right")
    points = hook_points(Intervention(("resid_post",), Window(1, (0, 1, 2))))
    _, plain = record(model, batch, points)
    assert list(plain) == points

    def overwrite(_module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].zero_()

    # What runs next writes into the very tensor that the hook was given.
    model.hf.model.norm.register_forward_pre_hook(overwrite)
    _, overwritten = record(model, batch, points)
    for name in points:
        assert torch.equal(plain[name], overwritten[name])
