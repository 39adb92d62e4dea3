"""The optimizer step: sums over a step batch, and what it refuses and frees."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.training.test_train import (
    FORGET,
    RETAIN,
    WHOLE,
    largest_difference,
    options_of,
    relative_distance,
)
from unlearning import InputError, train
from unlearning.data.batches import TokenBatch
from unlearning.methods import METHODS
from unlearning.training.references import References


@pytest.mark.parametrize("method", ["finetune", "grad_diff", "npo"])
def test_one_step_does_not_depend_on_how_the_step_is_split(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    # Answers of very different lengths, so that a mean of micro-batch means would differ.
    examples = build_examples()
    longer = [replace(example, answer=example.answer * (1 + 3 * (place % 3))) for place, example in enumerate(examples)]
    kept = [replace(example, prompt=f"{example.prompt} I mean") for example in examples]
    data: dict[str, Any] = {"retain": longer} if method == "finetune" else {"forget": longer, "retain": kept}

    def one_step(batch_size: int) -> tuple[PreTrainedModel, dict[str, float], Tensor]:
        model = build_tiny_llama()
        gradients: dict[str, Tensor] = {}  # as they stand when the last micro-batch has been added
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.update({name: p.grad.clone().flatten()})
            )
        result = train(
            method,
            model=model,
            tokenizer=tokenizer,
            progress=False,
            max_steps=1,
            learning_rate=1e-3,
            batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            **data,
        )
        return result.model, result.history[0], torch.cat([gradients[name] for name in sorted(gradients)])

    singly, singly_line, singly_gradient = one_step(1)
    model, line, gradient = one_step(4)
    assert (gradient - singly_gradient).norm() < 1e-5 * gradient.norm()
    assert largest_difference(model, build_tiny_llama()) > 5e-4
    assert relative_distance(model, singly, build_tiny_llama()) < 1e-3
    for name in ("loss", "grad_norm"):
        assert line[name] == pytest.approx(singly_line[name], rel=1e-4)


def test_a_last_short_step_batch_is_normalised_by_its_own_size(tokenizer: PreTrainedTokenizerFast) -> None:
    """Three examples by twos: the second step sees one example, and its loss is that example's."""
    result = train(
        "npo",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        forget=FORGET[:3],
        progress=False,
        alpha=0,
        epochs=1,
        batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-9,
        logging_steps=1,
    )
    assert [line["forget_loss"] for line in result.history] == pytest.approx([13.8629, 13.8629], abs=1e-3)


def test_every_retain_example_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    npo = METHODS["npo"]
    seen: list[str] = []

    def watching(model: PreTrainedModel, batch: Any, options: Any) -> Any:
        seen.extend(tokenizer.batch_decode(batch.retain.input_ids))
        return npo.retain_loss(model, batch, options)

    monkeypatch.setitem(METHODS, "npo", replace(npo, retain_loss=watching))
    train(
        "npo",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        forget=FORGET[:2],
        retain=build_examples()[2:],
        progress=False,
        epochs=3,
        batch_size=1,
        gradient_accumulation_steps=1,
    )
    questions = {text.split("\n")[0] for text in seen}
    assert len(seen) == len(questions) == 6


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"of grad_diff .* at step [23] of 3, .*examples .* nothing was saved.*`learning_rate`"
    ):
        train(
            "grad_diff",
            model=model_dir,
            output_dir=tmp_path / "out",
            progress=False,
            max_steps=3,
            **{**options_of("grad_diff"), **WHOLE, "learning_rate": 1e30},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["npo", "undial"])
def test_reference_logits_are_freed_before_the_backward_pass_ends(
    method: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the reference model are as large as the model's own: those of retain (npo) and of forget examples."""
    given: list[weakref.ref[Tensor]] = []
    left: list[bool] = []
    attach = References.attach

    def watched(self: References, data: str, indices: list[int], batch: TokenBatch) -> TokenBatch:
        batch = attach(self, data, indices, batch)
        if batch.reference_logits is not None:
            given.append(weakref.ref(batch.reference_logits))
        return batch

    monkeypatch.setattr(References, "attach", watched)
    model = build_tiny_llama()
    model.get_input_embeddings().weight.register_hook(lambda _: left.append(any(kept() is not None for kept in given)))
    options = {**WHOLE, "gradient_accumulation_steps": 2, "batch_size": 2, "max_steps": 1}
    data = {"forget": FORGET} | ({"retain": RETAIN, "retain_loss": "kl"} if method == "npo" else {"alpha": 0})
    train(method, model=model, tokenizer=tokenizer, progress=False, **options, **data)
    assert len(given) == 2 and not any(left) and len(left) == (4 if method == "npo" else 2)
