"""Examples as tokens: what is cut or left out is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import TEXT, build_tokenizer
from unlearning import Example, InputError
from unlearning.data.batches import LabelledSpan, collate, n_predicted
from unlearning.data.encoding import encode, put_before
from unlearning.data.spans import encode_answer

TOKENIZER = build_tokenizer(bos=True)
EXAMPLES = [
    Example("Question: Who kept the lamp?\nAnswer:", "Ines Tallow"),
    Example(
        "Question: Who built the lighthouse of Marrow Point?\nAnswer:", "Ines Tallow, who kept its lamp after that"
    ),
    Example("", TEXT),
    Example("", "The lamp"),
]
LENGTHS = [len(encode_answer(TOKENIZER, e.prompt, e.answer, append_eos=True).input_ids) for e in EXAMPLES]
LIMIT = LENGTHS[1] - 3
assert max(LENGTHS[0], LENGTHS[3]) < LIMIT < LENGTHS[2]


def test_without_a_limit_every_example_is_one_span() -> None:
    encoded = encode(TOKENIZER, EXAMPLES, append_eos=True, max_length=None)
    assert [len(span.input_ids) for span in encoded.spans] == LENGTHS
    assert encoded.origin == [0, 1, 2, 3] and not encoded.notes


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("example", EXAMPLES, ids=["short", "long", "document", "short document"])
def test_a_text_before_an_example_leaves_its_tokens_and_its_loss(example: Example, bos: bool) -> None:
    tokenizer = build_tokenizer(bos=bos)
    span = encode_answer(tokenizer, example.prompt, example.answer, append_eos=True)
    before = tokenizer("Who knows:\n", add_special_tokens=False)["input_ids"]
    longer = put_before(tokenizer, "Who knows:\n", span)
    assert longer.input_ids == [*span.input_ids[: int(bos)], *before, *span.input_ids[int(bos) :]]
    assert n_predicted(longer) == n_predicted(span) > 0
    labels = [1 + token for token in span.input_ids]
    labelled = LabelledSpan(span.input_ids, labels, [place >= span.answer_start for place in range(len(labels))])
    found = put_before(tokenizer, "Who knows:\n", labelled)
    assert isinstance(found, LabelledSpan) and found.input_ids == longer.input_ids
    kept = [[t for t, is_on in zip(s.targets, s.mask, strict=True) if is_on] for s in (labelled, found)]
    assert kept[0] == kept[1] and len(found.mask) == len(found.targets) == len(found.input_ids)


def test_documents_are_cut_and_counted_and_questions_are_refused() -> None:
    with pytest.raises(InputError) as error:
        encode(TOKENIZER, EXAMPLES, append_eos=True, max_length=LIMIT)
    said = str(error.value)
    assert said.startswith(f"example 2 ('Question: Who built the lighthouse of Ma') has {LENGTHS[1]} tokens")
    assert f"`max_length` is {LIMIT}" in said and "`too_long`" in said
    encoded = encode(TOKENIZER, [EXAMPLES[0], *EXAMPLES[2:]], append_eos=True, max_length=LIMIT)
    n_pieces = -(-(LENGTHS[2] - 1) // (LIMIT - 1))
    assert encoded.origin == [0, *[1] * n_pieces, 2]
    assert encoded.notes == (f"documents longer than max_length {LIMIT}: 1, cut; {n_pieces + 1} texts in all",)


def test_too_long_an_answer_is_cut_or_left_out_and_counted() -> None:
    whole = encode(TOKENIZER, EXAMPLES[:2], append_eos=True, max_length=None).spans
    cut = encode(TOKENIZER, EXAMPLES[:2], append_eos=True, max_length=LIMIT, too_long="cut")
    assert cut.spans[0] == whole[0] and cut.spans[1].input_ids == whole[1].input_ids[:LIMIT]
    assert cut.spans[1].answer_start == whole[1].answer_start
    start = f"examples longer than max_length {LIMIT}: 1 of 2, "
    assert cut.notes == (f"{start}cut at the end (3 answer tokens are not trained on)",)
    skipped = encode(TOKENIZER, EXAMPLES[:2], append_eos=True, max_length=LIMIT, too_long="skip")
    assert skipped.spans == whole[:1] and skipped.origin == [0]
    assert skipped.notes == (f"{start}left out ({whole[1].n_answer_tokens} answer tokens are not trained on)",)


def test_a_cut_that_leaves_no_answer_is_refused() -> None:
    start = encode_answer(TOKENIZER, EXAMPLES[1].prompt, EXAMPLES[1].answer).answer_start
    with pytest.raises(
        InputError, match=f"a prompt of {start} tokens, which leaves no answer within `max_length` {start};"
    ):
        encode(TOKENIZER, EXAMPLES[1:2], append_eos=True, max_length=start, too_long="cut")
    (span,) = encode(TOKENIZER, EXAMPLES[1:2], append_eos=True, max_length=start + 1, too_long="cut").spans
    assert span.n_answer_tokens == 1
    with pytest.raises(InputError, match="none of the 2 examples is left"):
        encode(TOKENIZER, EXAMPLES[:2], append_eos=True, max_length=5, too_long="skip")


def test_a_document_of_one_token_is_left_out_and_counted() -> None:
    tokenizer = build_tokenizer()
    encoded = encode(tokenizer, [Example("", "a"), EXAMPLES[3]], append_eos=False, max_length=None)
    assert encoded.origin == [1]
    assert encoded.notes == ("documents of a single token, which nothing predicts: 1, left out",)


@given(
    answers=st.lists(st.text("abTallow .\n", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=5),
    documents=st.booleans(),
)
@settings(max_examples=60)
def test_masks_come_from_lengths_where_the_tokenizer_has_no_pad_token(answers: list[str], documents: bool) -> None:
    assert TOKENIZER.pad_token is None
    # The end-of-sequence token is number 0, which is what the batches are filled with, and stands inside a text too.
    prompt = "" if documents else "Who?<eos>"
    encoded = encode(TOKENIZER, [Example(prompt, answer) for answer in answers], append_eos=True, max_length=None)
    batch = collate(encoded.spans)
    for row, span in enumerate(encoded.spans):
        length = len(span.input_ids)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert batch.input_ids[row, :length].tolist() == span.input_ids
        assert span.input_ids[-1] == TOKENIZER.eos_token_id
        predicted = batch.predicts_answer[row].nonzero().flatten() + 1
        assert predicted.tolist() == list(range(span.answer_start, length))


def test_the_end_of_sequence_token_must_exist_where_it_is_asked_for() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="`append_eos`.*no end-of-sequence token"):
        encode(tokenizer, EXAMPLES, append_eos=True, max_length=None)
