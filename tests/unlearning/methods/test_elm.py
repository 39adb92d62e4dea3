"""ELM: a whole training against a plain loop in float64, and prompts that give no targets."""

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
    pooled,
    slopes,
)
from unlearning import Example, InputError, train

OWN: dict[str, Any] = {
    "concept": "towns",
    "novice": "A stranger to {concept}:",
    "expert": "One who knows {concept}:",
    "eta": 3.0,
    "gamma": 0.7,
    "alpha": 2.0,
}


def targets(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """log q of the forget answers' tokens: products of probabilities, normalised, each text tokenised as a whole."""
    with torch.no_grad():
        reference = build_tiny_llama().double()
        alone, novice, expert = (
            answers(reference, tokenizer, [Example(line + example.prompt, example.answer) for example in FORGET])
            for line in ("", "A stranger to towns:\n", "One who knows towns:\n")
        )
    found = []
    for (p, tokens), (p_novice, _), (p_expert, _) in zip(alone, novice, expert, strict=True):
        q = p.exp() * (p_novice.exp() / p_expert.exp()) ** OWN["eta"]
        found.append(((q / q.sum(-1, keepdim=True)).log(), tokens))
    return found


@pytest.mark.parametrize("retain_loss", ["kl", "nll"])
@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_the_model_is_drawn_to_the_novice(
    sizes: dict[str, int], retain_loss: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    wanted = targets(tokenizer)
    with torch.no_grad():
        kept = answers(build_tiny_llama().double(), tokenizer, RETAIN)

    def forget_slopes(model: PreTrainedModel, _step: int, _reference: Any) -> list[Tensor]:
        return slopes(OWN["gamma"] * divergence(answers(model, tokenizer, FORGET), wanted), model)

    def away_from_the_text(model: PreTrainedModel, _step: int, _reference: Any) -> list[Tensor]:
        return slopes(-pooled(answers(model, tokenizer, FORGET)), model)

    loop: dict[str, Any] = {"alpha": OWN["alpha"]}
    loop |= {"retain_loss": lambda found: divergence(found, kept)} if retain_loss == "kl" else {}
    trained = train(
        "elm", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **OWN, retain_loss=retain_loss
    )
    assert_close(
        trained.model, plain_loop(tokenizer, forget_slopes, **loop), plain_loop(tokenizer, away_from_the_text, **loop)
    )
    first = divergence(answers(build_tiny_llama().double(), tokenizer, FORGET), wanted)
    assert trained.history[0]["forget_loss"] == pytest.approx(first.item(), rel=1e-4)


def test_a_reference_that_stays_loaded_gives_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    runs = [
        train("elm", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **OWN, reference_budget=budget)
        for budget in (4.0, 0.0)
    ]
    for one, other in zip(*(run.history for run in runs), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concept": None}, "elm needs `concept`, what is to be forgotten"),
        ({"novice": "A stranger:"}, "`novice` must contain {concept}, got 'A stranger:'"),
        ({"expert": "One who knows:"}, "`expert` must contain {concept}, got 'One who knows:'"),
        ({"expert": OWN["novice"]}, "`novice` and `expert` must differ"),
        (
            {"concept": 40 * "towns "},
            "before the forget texts makes ",
        ),
    ],
    ids=str,
)
def test_lines_that_give_no_targets(given: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError) as error:
        train("elm", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **(OWN | given))
    assert message in str(error.value) and "\n" not in str(error.value)
