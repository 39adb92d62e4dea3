"""Layered unlearning: which fold is forgotten when, and a whole training against a plain loop in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.plain import (
    ALPHA,
    BETA,
    FORGET,
    RUN,
    SIZES,
    answers,
    assert_close,
    nll,
    npo,
    plain_loop,
    slopes,
)
from unlearning import train
from unlearning.data.batches import TokenBatch
from unlearning.methods.layered import forgotten
from unlearning.methods.method import Batch, StepBatch


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, [True, False, False, True]),
        (0.33, [True, False, False, True]),
        (0.34, [True, True, False, True]),
        (0.67, [True, True, True, True]),
        (0.999, [True, True, True, True]),
    ],
)
def test_folds_are_forgotten_one_after_the_other(progress: float, expected: list[bool]) -> None:
    texts = torch.ones(4, 2, dtype=torch.long)
    forget = TokenBatch(texts, texts, texts.bool(), index=torch.tensor([0, 1, 2, 3]))
    assert forgotten(Batch(StepBatch(progress=progress), forget=forget), 3).tolist() == expected


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_two_stages(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    """Of four steps the first two forget examples 0 and 2 and keep 1 and 3."""

    def stage(model: PreTrainedModel, step: int, reference: list[Tensor]) -> list[Tensor]:
        losses = nll(answers(model, tokenizer, FORGET))
        going = [0, 2] if step < 2 else [0, 1, 2, 3]
        forgets = [-(2 / BETA) * F.logsigmoid(BETA * (losses[i] - reference[i])) for i in going]
        n_tokens = sum(len(tokens) for _, tokens in answers(model, tokenizer, FORGET))
        keeps = [losses[i] for i in range(4) if i not in going]
        kept = torch.stack(keeps).sum() / n_tokens if keeps else torch.zeros(())
        return slopes(torch.stack(forgets).sum() / 4 + ALPHA * kept, model)

    own: dict[str, Any] = {"folds": 2, "beta": BETA, "alpha": ALPHA}
    trained = train("layered", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    unmoved = plain_loop(tokenizer, lambda m, _, r: slopes(npo(answers(m, tokenizer, FORGET), r), m))
    assert_close(trained.model, plain_loop(tokenizer, stage), unmoved)


def test_the_recipe_keeps_the_learning_rate_over_the_stages(tokenizer: PreTrainedTokenizerFast) -> None:
    free = {name: value for name, value in RUN.items() if name != "lr_schedule"}
    trained = train("layered", model=build_tiny_llama(), tokenizer=tokenizer, **free)
    assert {line["learning_rate"] for line in trained.history} == {RUN["learning_rate"]}
    assert trained.options["lr_schedule"] == "constant"
    asked = train("layered", model=build_tiny_llama(), tokenizer=tokenizer, **free, lr_schedule="linear")
    assert asked.history[-1]["learning_rate"] < RUN["learning_rate"]
    assert train("npo", model=build_tiny_llama(), tokenizer=tokenizer, **free).options["lr_schedule"] == "linear"
