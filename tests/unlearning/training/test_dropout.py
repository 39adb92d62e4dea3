"""Dropout in training: off where a loss compares with the start model, as the model has it elsewhere."""

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples
from unlearning import train
from unlearning.data.encoding import encode
from unlearning.evaluation.answers import answer_likelihoods
from unlearning.methods import METHODS

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
ALTERNATES = [["nowhere"], ["in a town"], ["far away"], ["at sea"]]


def build() -> GPT2LMHeadModel:
    """GPT-2 as it is published: dropout .1 in three places."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    return GPT2LMHeadModel(config)


def first(method: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, float]:
    result = train(
        method,
        model=build(),
        tokenizer=tokenizer,
        max_steps=1,
        batch_size=2,
        gradient_accumulation_steps=2,
        progress=False,
        device="cpu",
        **{"forget": FORGET, "retain": RETAIN, **options},
    )
    return result.history[0]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("method", ["npo", "dpo", "kto"])
def test_preferences_begin_at_their_analytic_value(
    method: str, beta: float, checkpointed: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    given = {} if method == "npo" else {"alternates": ALTERNATES}
    line = first(method, tokenizer, beta=beta, gradient_checkpointing=checkpointed, **given)
    assert line["forget_loss"] == pytest.approx(2 / beta * math.log(2), rel=1e-5)


@pytest.mark.parametrize(("method", "options"), [("grad_diff", {"retain_loss": "kl"}), ("rmu", {"layer": 0})], ids=str)
def test_what_is_kept_begins_at_zero(method: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    assert first(method, tokenizer, **options)["retain_loss"] == pytest.approx(0, abs=1e-6)


def test_a_statistic_and_the_loss_that_reads_it_drop_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    """ILU without its forget loss reads no reference, but takes two passes over the retain examples."""
    line = first("ilu", tokenizer, gamma=0, max_grad_norm=0)
    spans = encode(tokenizer, RETAIN, append_eos=True, max_length=None).spans
    model, rows, answers = build().double().eval(), [], []
    for span in spans:
        rows.append(model(torch.tensor([span.input_ids])).logits[0, span.answer_start - 1 : -1])
        answers += span.input_ids[span.answer_start :]
    z, y = torch.cat(rows), torch.tensor(answers)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(scale * z, y)
    (slope,) = torch.autograd.grad(loss, scale)
    weight = METHODS["ilu"].options().invariance
    assert line["retain_loss"] == pytest.approx((loss + weight * slope**2).item(), rel=1e-5)


def test_a_method_without_a_reference_keeps_the_models_dropout(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = encode(tokenizer, FORGET, append_eos=True, max_length=None).spans
    exact = answer_likelihoods(build().eval(), spans, batch_size=4)["nll"]
    assert first("npo", tokenizer)["forget_loss"] == pytest.approx(20 * math.log(2), rel=1e-5)
    assert abs(-first("ga", tokenizer, retain=None)["forget_loss"] - exact) > 0.01
