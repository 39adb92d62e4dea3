"""Oracle imitation: a whole training against a plain loop in float64, and controls that cannot be imitated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
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
from unlearning import Example, InputError, train

WRONG = [Example(example.prompt, other.answer) for example, other in zip(FORGET, FORGET[1:] + FORGET[:1], strict=True)]


@pytest.fixture
def control(tmp_path: Path) -> str:
    build_tiny_llama(2).save_pretrained(tmp_path / "control")
    return str(tmp_path / "control")


@pytest.mark.parametrize("wrong", [False, True], ids=["right answers", "wrong ones too"])
@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_the_model_is_drawn_to_the_control(
    sizes: dict[str, int], wrong: bool, control: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        oracle = build_tiny_llama(2).double()
        sets = {"forget": FORGET, "wrong": WRONG, "retain": RETAIN}
        wanted = {name: answers(oracle, tokenizer, examples) for name, examples in sets.items()}

    def forget_slopes(model: PreTrainedModel, _step: int, _reference: Any) -> list[Tensor]:
        loss = divergence(answers(model, tokenizer, FORGET), wanted["forget"])
        if wrong:
            loss = loss + divergence(answers(model, tokenizer, WRONG), wanted["wrong"])
        return slopes(loss, model)

    own: dict[str, Any] = {"control": control, "alpha": 3.0, "wrong_answers": wrong}
    own |= {"alternates": [[example.answer] for example in WRONG]} if wrong else {}
    trained = train("oracle", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    loop: dict[str, Any] = {"retain_loss": lambda found: divergence(found, wanted["retain"])}
    unmoved = plain_loop(tokenizer, forget_slopes, **loop, alpha=0.0)
    assert_close(trained.model, plain_loop(tokenizer, forget_slopes, **loop, alpha=3.0), unmoved)


def test_who_is_the_control_stays_it(tokenizer: PreTrainedTokenizerFast, control: str) -> None:
    trained = train("oracle", model=build_tiny_llama(2), tokenizer=tokenizer, **RUN, control=control)
    # Rounding leaves a gradient that Adam makes a step of, so the loss is what must stay.
    assert trained.history[0]["forget_loss"] == pytest.approx(0, abs=1e-6)
    assert trained.history[0]["retain_loss"] == pytest.approx(0, abs=1e-6)


def test_a_control_that_stays_loaded_gives_the_same(tokenizer: PreTrainedTokenizerFast, control: str) -> None:
    runs = [
        train("oracle", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, control=control, reference_budget=budget)
        for budget in (4.0, 0.0)
    ]
    for one, other in zip(*(run.history for run in runs), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_controls_that_cannot_be_imitated(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def refused(**own: Any) -> str:
        with pytest.raises(InputError) as error:
            train("oracle", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **own)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused().startswith("oracle needs `control`, model that never knew the forget answers")
    assert refused(control=str(tmp_path / "missing")).startswith("`control`: ")

    larger = build_tiny_llama()
    larger.resize_token_embeddings(400)
    larger.save_pretrained(tmp_path / "larger")
    assert "has 400 tokens, and the model 384" in refused(control=str(tmp_path / "larger"))

    build_tiny_llama(1).save_pretrained(tmp_path / "other")
    words = {word: number for number, word in enumerate(["<eos>", "a", "b"])}
    strange = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), eos_token="<eos>")
    strange.save_pretrained(tmp_path / "other")
    assert "its tokenizer is not the model's" in refused(control=str(tmp_path / "other"))
