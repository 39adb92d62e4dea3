"""Batches and the forward pass over answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from unlearning import Example
from unlearning.data.batches import collate, n_predicted
from unlearning.data.encoding import encode
from unlearning.data.spans import AnswerSpan
from unlearning.objectives.forward import answer_nll, answer_sequence_nll

MODEL = build_tiny_llama().double()

# Token 0 is the end-of-sequence token: it may stand inside a text and is still a token.
SPANS = st.lists(st.integers(0, 383), min_size=2, max_size=12).flatmap(
    lambda ids: st.builds(AnswerSpan, st.just(ids), st.integers(0, len(ids) - 1))
)


def slow_nll(span: AnswerSpan) -> float:
    """One unpadded forward pass, one token at a time."""
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([span.input_ids])).logits[0]
    total = 0.0
    for place in range(max(span.answer_start, 1), len(span.input_ids)):
        total -= logits[place - 1].log_softmax(-1)[span.input_ids[place]].item()
    return total


@given(spans=st.lists(SPANS, min_size=1, max_size=5))
@settings(max_examples=25)
def test_padding_changes_nothing(spans: list[AnswerSpan]) -> None:
    with torch.no_grad():
        together = answer_sequence_nll(MODEL, collate(spans))
    assert together.tolist() == pytest.approx([slow_nll(span) for span in spans], abs=1e-9)


@given(spans=st.lists(SPANS, min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_batch_order_changes_nothing(spans: list[AnswerSpan], seed: int) -> None:
    order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        straight = answer_sequence_nll(MODEL, collate(spans))
        mixed = answer_sequence_nll(MODEL, collate([spans[place] for place in order]))
    torch.testing.assert_close(mixed, straight[order], atol=1e-9, rtol=0)


def test_only_answer_tokens_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    (span,) = encode(tokenizer, [Example("Where?", "in Oslo")], append_eos=True, max_length=None).spans
    batch = collate([span])
    predicted = batch.input_ids[0, 1:][batch.predicts_answer[0, :-1]]
    assert tokenizer.decode(predicted) == " in Oslo<eos>"
    assert n_predicted(span) == len(predicted) == len(answer_nll(MODEL, batch))


def test_an_empty_prompt_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (span,) = encode(tokenizer, [Example("", "Oslo is a town")], append_eos=False, max_length=None).spans
    assert (
        collate([span]).predicts_answer.sum() == n_predicted(span) == len(tokenizer("Oslo is a town")["input_ids"]) - 1
    )
