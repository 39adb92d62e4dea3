"""BLUR and the paper's two ablations: the gradient that the optimizer gets, against plain autograd in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import Example, train
from unlearning.data.encoding import encode
from unlearning.methods import METHODS
from unlearning.methods.blur import BLUROptions, loss_options
from unlearning.methods.npo import NPOOptions
from unlearning.methods.simnpo import SimNPOOptions
from unlearning.objectives.combination import WeightedSum

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]


def plain_gradient(tokenizer: PreTrainedTokenizerFast, examples: list[Example], sign: float) -> dict[str, Tensor]:
    """The gradient of sign * CE of all answers, text by text."""
    model = build_tiny_llama().double()
    spans = encode(tokenizer, examples, append_eos=True, max_length=None).spans
    nll = []
    for span in spans:
        rows = model(torch.tensor([span.input_ids])).logits[0, span.answer_start - 1 : -1].log_softmax(-1)
        nll += [-row[token] for row, token in zip(rows, span.input_ids[span.answer_start :], strict=True)]
    (sign * torch.stack(nll).mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def given_to_the_optimizer(tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, Tensor]:
    model = build_tiny_llama()
    seen: list[dict[str, Tensor]] = []

    def look(*_: Any) -> None:
        seen.append({name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(look)
    try:
        train(
            "blur",
            model=model,
            tokenizer=tokenizer,
            forget=FORGET,
            retain=RETAIN,
            forget_loss="ga",
            max_steps=1,
            batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0,
            progress=False,
            device="cpu",
            **options,
        )
    finally:
        hook.remove()
    (found,) = seen
    return found


@pytest.mark.parametrize(
    ("variant", "scope"),
    [("blur", "global"), ("blur", "layer"), ("swapped", "global"), ("swapped", "layer"), ("sum", "global")],
)
def test_the_optimizer_gets_the_papers_direction(variant: str, scope: str, tokenizer: PreTrainedTokenizerFast) -> None:
    gamma = 0.3
    f, r = plain_gradient(tokenizer, FORGET, -1), plain_gradient(tokenizer, RETAIN, 1)
    options = {"variant": variant, "gamma": gamma} | ({} if variant == "sum" else {"scope": scope})
    found = given_to_the_optimizer(tokenizer, **options)
    groups: dict[str, list[str]] = {}
    for name in f:
        block = name.split(".")[2] if name.startswith("model.layers.") else ""
        groups.setdefault(block if scope == "layer" else "", []).append(name)
    for names in groups.values():
        rf = sum((r[name] * f[name]).sum() for name in names)
        ff, rr = (sum((g[name] ** 2).sum() for name in names) for g in (f, r))
        for name in names:
            expected = {
                "blur": r[name] + (gamma - rf / ff) * f[name],
                "swapped": f[name] + (gamma - rf / rr) * r[name],
                "sum": f[name] + gamma * r[name],
            }[variant]
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_a_weighted_sum_needs_no_gradients_apart() -> None:
    combination = METHODS["blur"].combination(BLUROptions(variant="sum", gamma=0.25))
    assert combination == WeightedSum(gamma=1.0, alpha=0.25)


def test_the_inverse_temperature_is_the_one_that_its_help_names() -> None:
    assert loss_options(BLUROptions()) == NPOOptions(beta=0.1)
    simple = loss_options(BLUROptions(forget_loss="simnpo"))
    assert isinstance(simple, SimNPOOptions) and simple.beta == 4.5
    (beta,) = [field for field in dataclasses.fields(BLUROptions) if field.name == "beta"]
    assert "(none: 0.1 or 4.5)" in beta.metadata["help"]
