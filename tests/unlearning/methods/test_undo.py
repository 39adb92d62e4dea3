"""UNDO: what the noise is, and a whole training against a plain loop in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.plain import (
    FORGET,
    RETAIN,
    RUN,
    SIZES,
    answers,
    assert_close,
    divergence,
    plain_loop,
    slopes,
)
from unlearning import InputError, train
from unlearning.methods.undo import UNDOOptions, add_noise, xavier

NOISE = {"noise": 0.5, "noise_scale": 0.3, "noise_seed": 7}


def noisy() -> PreTrainedModel:
    """The start, shrunk and with Xavier's noise, matrix by matrix as torch draws it."""
    model = build_tiny_llama()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.zeros_like(parameter)
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(drawn, generator=generator)
            parameter.copy_(0.5 * parameter + 0.5 * 0.3 * drawn)
    return model


def test_the_noise_is_that_of_a_new_model() -> None:
    model = build_tiny_llama()
    with torch.no_grad():
        add_noise(list(model.named_parameters()), UNDOOptions(**NOISE))
    for ours, theirs in zip(model.parameters(), noisy().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
    stack = xavier(torch.Size([3, 40, 60]), torch.Generator().manual_seed(0))  # experts, each a matrix of its own
    assert 0.98 * (6 / 100) ** 0.5 < stack.abs().max() <= (6 / 100) ** 0.5


def test_no_noise_changes_nothing_and_all_of_it_leaves_nothing() -> None:
    model = build_tiny_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        add_noise(list(model.named_parameters()), UNDOOptions(noise=0.0))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        add_noise(list(model.named_parameters()), UNDOOptions(noise=1.0, noise_scale=0.0))
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_the_noisy_copy_is_drawn_to_what_it_was(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        teacher = build_tiny_llama().double()
        wanted = {data: answers(teacher, tokenizer, examples) for data, examples in SETS.items()}

    def forget_slopes(model: PreTrainedModel, _step: int, _reference: Any) -> list[Tensor]:
        return slopes(divergence(answers(model, tokenizer, FORGET), wanted["forget"]), model)

    trained = train("undo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **NOISE, alpha=3.0)
    loop: dict[str, Any] = {"retain_loss": lambda found: divergence(found, wanted["retain"])}
    expected = plain_loop(tokenizer, forget_slopes, **loop, start=noisy(), alpha=3.0)
    unmoved = plain_loop(tokenizer, forget_slopes, **loop, start=noisy(), alpha=0.0)
    assert_close(trained.model, expected, unmoved)
    assert trained.evaluations[0]["retain_probability"] > 0  # of the model as it was given
    first = trained.history[0]
    assert first["forget_loss"] == pytest.approx(
        float(divergence(answers(noisy().double(), tokenizer, FORGET), wanted["forget"])), rel=1e-4
    )


SETS = {"forget": FORGET, "retain": RETAIN}


def test_metrics_begin_with_the_model_as_it_was_given(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = train("npo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN)
    undone = train("undo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN)
    assert undone.evaluations[0] == plain.evaluations[0]


@pytest.mark.parametrize("update", ["stochastic", "master"])
def test_the_noise_stays_in_bfloat16_weights(update: str, tokenizer: PreTrainedTokenizerFast) -> None:
    still = {**RUN, "learning_rate": 1e-30, "max_steps": 2, "precision": "bfloat16", "bfloat16_update": update}
    trained = train("undo", model=build_tiny_llama(), tokenizer=tokenizer, **still, **NOISE)
    expected = copy.deepcopy(build_tiny_llama().bfloat16())
    with torch.no_grad():
        add_noise(list(expected.named_parameters()), UNDOOptions(**NOISE))
    for ours, theirs in zip(trained.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


def test_an_adapter_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="`lora_rank` is not supported by undo, which adds noise to the model's") as e:
        train("undo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, lora_rank=2)
    assert "\n" not in str(e.value)
