"""Scored logits are those of a whole forward pass, whichever positions go through the head."""

from pathlib import Path

import pytest

from dissect.engine import reference
from dissect.scoring.forward import scored_logits
from tests.dissect.helpers import assert_close, build_batch, build_pair, torch_state

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2", "olmo", "opt", "bloom", "falcon", "qwen3", "gptj"]


@pytest.mark.parametrize("only_scored", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen3_moe", "neox_sequential"])
def test_scored_logits_are_those_of_a_whole_pass(family: str, only_scored: bool, tmp_path: Path) -> None:
    model = build_pair(family).unlearned
    before = torch_state(model)
    for side in ("left", "right"):
        batch = build_batch(tmp_path, side)
        found = scored_logits(model, batch, only_scored=only_scored)
        assert_close(found, reference.scored_logits(model, batch, []), atol=1e-4)
    assert torch_state(model) == before
