"""LAT: the adversary finds what brings answers out, and a training follows a plain loop in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.helpers import DATA, MODEL, batch_of
from tests.unlearning.methods.plain import (
    ALPHA,
    BETA,
    FORGET,
    RUN,
    SIZES,
    assert_close,
    nll,
    plain_loop,
    slopes,
)
from unlearning import InputError, train
from unlearning.data.batches import collate
from unlearning.data.encoding import encode
from unlearning.data.spans import AnswerSpan
from unlearning.methods import METHODS
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.objectives.perturbation import eliciting, perturbed, prompt_tokens

RADIUS, STEPS = 2.0, 3


def slow_answer(model: PreTrainedModel, span: AnswerSpan, layer: int, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the answer's tokens of one unpadded text, with something added to a block's output."""
    handle = None
    if added is not None:
        handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, output: output + added)
    logits = model(torch.tensor([span.input_ids])).logits[0, span.answer_start - 1 : -1]
    if handle is not None:
        handle.remove()
    return logits.log_softmax(-1), torch.tensor(span.input_ids[span.answer_start :])


def slow_delta(model: PreTrainedModel, span: AnswerSpan, layer: int, radius: float, steps: int) -> Tensor:
    """The same search on one text, token by token."""
    d_model = model.config.hidden_size
    delta = torch.zeros(1, len(span.input_ids), d_model, dtype=model.dtype)
    for _ in range(steps):
        delta.requires_grad_(True)
        log_p, tokens = slow_answer(model, span, layer, delta)
        (slope,) = torch.autograd.grad(-log_p[torch.arange(len(tokens)), tokens].sum(), delta)
        delta = delta.detach().clone()
        for place in range(span.answer_start):
            along = slope[0, place]
            if along.norm() > 0:
                delta[0, place] -= 2 * radius / steps * along / along.norm()
            if delta[0, place].norm() > radius:
                delta[0, place] *= radius / delta[0, place].norm()
    return delta.detach()


def test_the_search_is_that_of_every_text_alone() -> None:
    batch = batch_of(DATA.forget, (), "forget", padding=2)
    model = MODEL.float()
    try:
        found = eliciting(model, batch, 0, radius=RADIUS, steps=STEPS)
        for row, span in zip(found, DATA.forget, strict=True):
            expected = slow_delta(model, span, 0, RADIUS, STEPS)
            torch.testing.assert_close(row[: len(span.input_ids)], expected[0], atol=1e-4, rtol=1e-3)
            assert not row[span.answer_start :].any()
            assert float(row.norm(dim=-1).max()) <= RADIUS * (1 + 1e-5)
        with torch.no_grad():
            before = answer_sequence_nll(model, batch)
            with perturbed(model, 0, found):
                after = answer_sequence_nll(model, batch)
        assert bool((after < before).all())
    finally:
        MODEL.double()


def test_a_text_without_a_prompt_is_perturbed_everywhere() -> None:
    batch = collate([AnswerSpan([1, 2, 3, 4], 2), AnswerSpan([1, 2, 3], 0)])
    assert prompt_tokens(batch).tolist() == [[True, True, False, False], [True, True, True, False]]


def test_a_larger_radius_brings_out_more() -> None:
    batch, model = batch_of(DATA.forget, (), "forget"), build_tiny_llama()
    found = []
    for radius in (0.01, 0.3, 3.0):
        with torch.no_grad(), perturbed(model, 1, eliciting(model, batch, 1, radius=radius, steps=6)):
            found.append(float(answer_sequence_nll(model, batch).sum()))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_a_training(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    spans = encode(tokenizer, FORGET, append_eos=True, max_length=None).spans

    def forget_slopes(radius: float) -> Any:
        def found(model: PreTrainedModel, _step: int, reference: list[Tensor]) -> list[Tensor]:
            plain = nll([slow_answer(model, span, 0, None) for span in spans])
            deltas = [slow_delta(model, span, 0, radius, STEPS) if radius else None for span in spans]
            attacked = nll([slow_answer(model, span, 0, delta) for span, delta in zip(spans, deltas, strict=True)])
            terms = [
                -(2 / BETA) * torch.nn.functional.logsigmoid(BETA * (ours - theirs))
                for ours, theirs in zip([*plain, *attacked], [*reference, *reference], strict=True)
            ]
            return slopes(torch.stack(terms).mean(), model)

        return found

    own = {"layer": 0, "radius": RADIUS, "attack_steps": STEPS, "beta": BETA, "alpha": ALPHA}
    trained = train("lat", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    assert_close(trained.model, plain_loop(tokenizer, forget_slopes(RADIUS)), plain_loop(tokenizer, forget_slopes(0)))


def test_the_radius_is_a_share_of_the_models_own_norms(tokenizer: PreTrainedTokenizerFast) -> None:
    found = train("lat", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, radius_scale=0.5)
    assert found.options["radius"] == pytest.approx(0.5 * found.notes["mean_norm"], rel=1e-3)
    with pytest.raises(InputError, match="`layer` must be between 0 and 1 for this model, got 7"):
        train("lat", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, layer=7)


def test_the_adversary_leaves_no_gradient_on_weights() -> None:
    model = build_tiny_llama()
    eliciting(model, batch_of(DATA.forget, (), "forget"), 0, radius=1.0, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert METHODS["lat"].needs(METHODS["lat"].options()).retain
