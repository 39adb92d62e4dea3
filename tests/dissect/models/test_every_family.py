"""Rewritings of every supported decoder: no crash, no changed output, no false alarm, and the base's order restored."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dissect.models.alignment import aligned, check_basis, find_differences
from dissect.models.canonical import canonical
from dissect.models.model import Model
from dissect.models.rewriting import rewritten
from dissect.models.symmetries import find_symmetries
from tests.dissect.families import CONFIGURATIONS, randomised
from tests.dissect.helpers import build_tokenizer, change_weights
from tests.dissect.models.rewriting_helpers import logit_gap
from unlearning.checkpoints.hashing import content_hash
from unlearning.common.errors import InputError

_HEADS: dict[str, Any] = CONFIGURATIONS["qwen3"][1]
_LINEAR = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4)
_LINEAR |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
ALL: dict[str, tuple[str, dict[str, Any]]] = CONFIGURATIONS | {
    "qwen 3.5, attention alone": ("qwen3_5_text", {**_HEADS, **_LINEAR, "layer_types": ["full_attention"] * 3}),
    "bert as a decoder": ("bert", {**CONFIGURATIONS["llama"][1], "is_decoder": True}),
    "gemma 3 with images": (
        "gemma3",
        {
            "text_config": CONFIGURATIONS["gemma 3"][1],
            "vision_config": {
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
}
HAVE = {
    "llama": {"heads", "query heads", "neurons", "mlp", "stream order"},
    "gpt-2": {"heads", "neurons", "stream order"},
    "modernbert decoder": {"heads", "neurons", "mlp"},  # gate and up projection in one matrix
    "gemma 4": {"heads", "query heads", "neurons"},
    "qwen3-next, attention alone": {"heads", "query heads", "normalised", "query"},  # queries hold gates too
    "afmoe": {"heads", "query heads"},  # a matrix beside the queries gates what each head writes
    "deepseek v3": {"experts", "neurons", "normalised", "stream order"},  # a latent, and a dense layer
    "bert as a decoder": {"heads", "neurons"},
    "gemma 3 with images": {"heads", "neurons", "stream order"},  # an image tower that text never runs
}
"""Freedoms that some must have; they are tried by default: usual ones, and those whose weights hold more than their
name says."""


def pair(name: str) -> tuple[Model, Model]:
    """A base, and a model that differs from it as a fine-tuned one does."""
    kind, fields = ALL[name]
    torch.manual_seed(0)
    try:
        hf = randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)))
        base = Model.wrap(hf, build_tokenizer(), name="base")
    except InputError as error:
        pytest.skip(str(error))
    changed = copy.deepcopy(base.hf)
    change_weights(changed, scale=0.02)
    return base, replace(base, name="tuned", hf=changed, sha256=content_hash(changed, name="tuned"))


@pytest.mark.parametrize("name", [name if name in HAVE else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_a_model_of_every_family_is_rewritten_and_put_back(name: str) -> None:
    base, tuned = pair(name)
    check_basis(base, tuned)
    assert aligned(base, tuned) is tuned
    assert find_symmetries(tuned).kinds >= HAVE.get(name, set())
    moved = rewritten(tuned, seed=2, largest=1.0)  # orders and signs
    scaled = rewritten(tuned, seed=2, largest=3.0)
    back, near = aligned(base, moved), aligned(base, scaled)
    for other in (moved, scaled, back, near, canonical(tuned)):
        assert logit_gap(tuned, other) < 5e-3
    assert find_differences(base, near) == find_differences(base, back) == []
    for ours, theirs in zip(back.hf.parameters(), tuned.hf.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # a gain of 1 + w is rounded
