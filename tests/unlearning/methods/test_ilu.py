"""ILU: its penalty is the slope along a common factor of the logits, and a training follows a plain loop in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.helpers import DATA, MODEL, losses_of, slow_logits
from tests.unlearning.methods.plain import (
    ALPHA,
    BETA,
    FORGET,
    RUN,
    SIZES,
    answers,
    assert_close,
    npo,
    plain_loop,
    pooled,
    slopes,
)
from unlearning import InputError, train
from unlearning.methods import METHODS
from unlearning.methods.ilu import slopes as slopes_of
from unlearning.objectives.forward import AnswerLogits

INVARIANCE = 3.0


def test_the_slope_is_that_of_a_common_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 11, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 3, 10, 3, 7])
    found = slopes_of(AnswerLogits(logits, targets, torch.zeros(5, dtype=torch.long)))
    factor = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(factor * logits, targets, reduction="sum").backward()
    torch.testing.assert_close(found, factor.grad[:, 0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2)], ids=str)
def test_the_penalty_is_exact_however_the_step_is_split(cuts: tuple[int, ...]) -> None:
    options = METHODS["ilu"].options(invariance=INVARIANCE)
    _, found = losses_of(METHODS["ilu"], options, DATA, cuts=cuts, padding=2)
    rows = torch.cat([slow_logits(MODEL, span) for span in DATA.retain])
    targets = torch.tensor([token for span in DATA.retain for token in span.input_ids[span.answer_start :]])
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(factor * rows, targets)
    (slope,) = torch.autograd.grad(loss, factor, create_graph=True)
    expected = F.cross_entropy(rows, targets) + INVARIANCE * slope**2
    assert found is not None
    torch.testing.assert_close(found, expected)
    parameters = list(MODEL.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_a_training(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    def penalised(found: list[Any]) -> Tensor:
        every = [(log_p.exp() * log_p).sum(-1) - log_p.gather(-1, y[:, None])[:, 0] for log_p, y in found]
        return pooled(found) + INVARIANCE * torch.cat(every).mean() ** 2

    def forget_slopes(model: Any, _step: int, reference: list[Tensor]) -> list[Tensor]:
        return slopes(npo(answers(model, tokenizer, FORGET), reference), model)

    own = {"invariance": INVARIANCE, "beta": BETA, "alpha": ALPHA}
    trained = train("ilu", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    unmoved = plain_loop(tokenizer, forget_slopes)
    assert_close(trained.model, plain_loop(tokenizer, forget_slopes, retain_loss=penalised), unmoved)


def test_without_a_penalty_it_is_npo(tokenizer: PreTrainedTokenizerFast) -> None:
    ours = train("ilu", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, invariance=0.0)
    theirs = train("npo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_retain_data_cannot_be_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    without = {name: value for name, value in RUN.items() if name != "retain"}
    with pytest.raises(InputError, match=r"ilu needs retain data\. Give `retain`\.$"):
        train("ilu", model=build_tiny_llama(), tokenizer=tokenizer, **without)
