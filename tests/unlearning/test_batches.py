"""Batches, the forward pass over answers, and the pairing of forget and retain examples."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import Example, InputError
from unlearning.data.batches import PairSampler, collate, encode_examples
from unlearning.data.spans import AnswerSpan
from unlearning.forward import answer_nll, answer_sequence_nll, reference_nll

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
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing(spans: list[AnswerSpan]) -> None:
    with torch.no_grad():
        together = answer_sequence_nll(MODEL, collate(spans))
    assert together.tolist() == pytest.approx([slow_nll(span) for span in spans], abs=1e-9)


@given(spans=st.lists(SPANS, min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_batch_order_changes_nothing(spans: list[AnswerSpan], seed: int) -> None:
    order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        straight = answer_sequence_nll(MODEL, collate(spans))
        mixed = answer_sequence_nll(MODEL, collate([spans[place] for place in order]))
    torch.testing.assert_close(mixed, straight[order], atol=1e-9, rtol=0)


def test_only_answer_tokens_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    (span,) = encode_examples(tokenizer, [Example("Where?", "in Oslo")], append_eos=True, max_length=None)
    batch = collate([span])
    predicted = batch.input_ids[0, 1:][batch.predicts_answer[0, :-1]]
    assert tokenizer.decode(predicted) == " in Oslo<eos>"
    assert batch.n_answer_tokens == len(predicted) == len(answer_nll(MODEL, batch))


def test_an_empty_prompt_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (span,) = encode_examples(tokenizer, [Example("", "Oslo is a town")], append_eos=False, max_length=None)
    assert collate([span]).n_answer_tokens == len(tokenizer("Oslo is a town")["input_ids"]) - 1


def test_too_long_an_example_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"example 2 .* more than max_length 8; split the text or raise max_length"):
        encode_examples(tokenizer, [Example("a", "b"), Example("Where?", "o" * 40)], append_eos=True, max_length=8)


def test_reference_column_equals_a_frozen_copy_under_any_batch_size(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = encode_examples(tokenizer, build_examples(), append_eos=True, max_length=None)
    expected = [slow_nll(span) for span in spans]
    MODEL.train()
    for batch_size in (1, 3, 8):
        assert reference_nll(MODEL, spans, batch_size=batch_size).tolist() == pytest.approx(expected, abs=1e-9)
    assert MODEL.training
    MODEL.eval()


def test_the_reference_is_taken_without_dropout(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = encode_examples(tokenizer, build_examples(), append_eos=True, max_length=None)
    dropping = build_tiny_llama()
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropping.train()
    with torch.no_grad():
        disturbed = answer_sequence_nll(dropping, collate(spans))
    column = reference_nll(dropping, spans, batch_size=8)
    assert column.tolist() == pytest.approx([slow_nll(span) for span in spans], abs=1e-3)
    assert not torch.allclose(disturbed, column, atol=1e-2)  # the dropout is real


@given(n_main=st.integers(1, 12), n_retain=st.integers(1, 30), seed=st.integers(0, 99), n_epochs=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_pairing_goes_through_the_whole_retain_set(n_main: int, n_retain: int, seed: int, n_epochs: int) -> None:
    sampler = PairSampler(n_main, n_retain, seed=seed)
    partners = []
    for epoch in range(n_epochs):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert sorted(main for main, _ in pairs) == list(range(n_main))
        partners += [partner for _, partner in pairs]
    for lap in range(0, len(partners) - n_retain + 1, n_retain):
        assert sorted(partners[lap : lap + n_retain]) == list(range(n_retain))
    counts = Counter(partners)
    used = [counts[index] for index in range(n_retain)]
    assert max(used) - min(used) <= 1


def test_orders_depend_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = PairSampler(20, 50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 0)
    assert order(3, 1) != order(4, 1)
