"""SURE: the weights that it trains, against gradients text by text; and that it is NPO on them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.methods.helpers import DATA, MODEL, slow_nll
from unlearning import InputError, train
from unlearning.common.patterns import LENGTH
from unlearning.methods.stages import RunFacts
from unlearning.methods.sure import SUREOptions, gradient_norms, with_salient

RUN: dict[str, Any] = {
    "forget": build_examples()[:4],
    "retain": build_examples()[4:8],
    "batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def slow_norms() -> dict[str, float]:
    total = torch.stack([torch.stack(slow_nll(MODEL, span)).sum() for span in DATA.forget]).mean()
    names, parameters = zip(*MODEL.named_parameters(), strict=True)
    return {n: float(g.norm()) for n, g in zip(names, torch.autograd.grad(total, parameters), strict=True)}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_gradient_norms_are_those_of_the_texts_one_by_one(batch_size: int) -> None:
    before = [(parameter.requires_grad, parameter.grad) for parameter in MODEL.parameters()]
    norms = gradient_norms(MODEL, DATA.forget, batch_size=batch_size)
    assert norms == pytest.approx(slow_norms(), rel=1e-7)
    assert [(parameter.requires_grad, parameter.grad) for parameter in MODEL.parameters()] == before


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_the_share_of_the_longest_gradients_trains(share: float) -> None:
    norms = slow_norms()
    settled = with_salient(MODEL, RunFacts(DATA.forget, 4, 2), SUREOptions(salient_share=share))
    chosen = {name for name in norms if _matches(settled.options.salient, name)}
    assert len(chosen) == max(1, round(share * len(norms)))
    assert min(norms[name] for name in chosen) >= max((norms[n] for n in norms.keys() - chosen), default=0.0)


def _matches(pattern: str | None, name: str) -> bool:
    assert pattern is not None
    return re.search(pattern, name) is not None


def test_it_is_npo_on_those_weights(model_dir: Path, tmp_path: Path) -> None:
    ours = train("sure", model=model_dir, output_dir=tmp_path / "run", salient_share=0.25, **RUN)
    pattern = json.loads((tmp_path / "run" / "unlearning.json").read_text())["resolved"]["salient"]
    theirs = train("npo", model=model_dir, train_parameters=pattern, **RUN)
    start = build_tiny_llama().state_dict()
    moved = set()
    for (name, one), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        if not torch.equal(one, start[name]):
            moved.add(name)
    assert moved == {name for name, _ in ours.model.named_parameters() if _matches(pattern, name)}


def test_an_expression_that_matches_nothing_is_refused(model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"`salient` must match one of the 21 weights .*no_such_weight"):
        train("sure", model=model_dir, salient="no_such_weight", **RUN)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 1}], ids=str)
def test_a_model_of_many_layers_has_more_weights_than_an_expression_may_name(
    options: dict[str, Any], tokenizer: PreTrainedTokenizerFast, model_dir: Path
) -> None:
    config = build_tiny_llama().config
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 32, 16, 16
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.name_or_path = str(model_dir)
    result = train("sure", model=model, tokenizer=tokenizer, **options, **{**RUN, "max_steps": 1})
    pattern = result.options["salient"]
    assert len(pattern) > LENGTH
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    if options:
        adapted = {name.partition(".lora_")[0] for name in trained}
        linear = {name for name, module in LlamaForCausalLM(config).named_modules() if isinstance(module, nn.Linear)}
        assert adapted == {name for name in linear if _matches(pattern, f"{name}.weight")}
    else:
        assert len(trained) == round(0.5 * len(list(model.parameters())))
        assert trained == {name for name, _ in model.named_parameters() if _matches(pattern, name)}


def test_norms_of_bfloat16_weights_do_not_hang_on_the_batch_size() -> None:
    """64 times the same text: a sum in bfloat16 stops growing."""
    model = build_tiny_llama().bfloat16()
    one = gradient_norms(model, DATA.forget[:1], batch_size=1)
    many = gradient_norms(model, DATA.forget[:1] * 64, batch_size=1)
    assert many == pytest.approx(one, rel=1e-6)


def test_an_adapter_needs_linear_maps_among_the_weights(model_dir: Path) -> None:
    with pytest.raises(InputError, match="sure trains none of this model. Set `lora_targets`"):
        train("sure", model=model_dir, salient="norm", lora_rank=2, **RUN)
