"""The seam between prompt and answer: special tokens that are there already, and white space before the answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.unlearning.data.helpers import LLAMA_3, build_tokenizer
from unlearning.data.chat import chat_format
from unlearning.data.documents import cut_document
from unlearning.data.encoding import encode
from unlearning.data.question_answer import Example
from unlearning.data.spans import encode_answer, encode_prompt, encode_text

PLAIN = build_tokenizer()
WITH_BOS = build_tokenizer(bos=True)
WITH_TWO = build_tokenizer()
WITH_TWO._tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> <|im_start|> $A <eos>",
    special_tokens=[(token, WITH_TWO.convert_tokens_to_ids(token)) for token in ("<bos>", "<|im_start|>", "<eos>")],
)
TOKENIZERS = {"plain": PLAIN, "bos": WITH_BOS, "two and eos": WITH_TWO}
BEGINNING = {"plain": "", "bos": "<bos>", "two and eos": "<bos><|im_start|>"}

WORDS = st.lists(st.sampled_from(["Ines", "lamp", "Who", "kept", "the", "?"]), min_size=1, max_size=5).map(" ".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=WORDS, answer=WORDS)
@settings(max_examples=20, deadline=None)
def test_special_tokens_that_a_text_begins_with_are_not_added_again(name: str, prompt: str, answer: str) -> None:
    tokenizer, written = TOKENIZERS[name], BEGINNING[name] + prompt
    assert encode_text(tokenizer, written) == encode_text(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
    assert encode_prompt(tokenizer, written) == encode_prompt(tokenizer, prompt)
    for append_eos in (False, True):
        theirs = encode_answer(tokenizer, prompt, answer, append_eos=append_eos)
        assert encode_answer(tokenizer, written, answer, append_eos=append_eos) == theirs
    document = encode_answer(tokenizer, "", written)
    assert document == encode_answer(tokenizer, "", prompt)


def test_special_tokens_inside_a_text_and_more_of_them_stay() -> None:
    bos = WITH_BOS.bos_token_id
    assert encode_text(WITH_BOS, "<bos><bos>lamp")[:3] == [bos, bos, WITH_BOS("lamp")["input_ids"][1]]
    assert encode_text(WITH_BOS, "lamp <bos>")[-1] == bos
    assert encode_text(WITH_BOS, "<bos>lamp", add_special_tokens=False).count(bos) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=WORDS, spaces=st.text(" \n\t", max_size=4), answer=WORDS)
@settings(max_examples=25, deadline=None)
def test_what_a_model_continues_is_how_the_whole_text_begins(name: str, prompt: str, spaces: str, answer: str) -> None:
    """Scoring reads prompt and answer together, generation the prompt alone: the tokens before the answer agree."""
    tokenizer = TOKENIZERS[name]
    ids = encode_prompt(tokenizer, prompt + spaces)
    whole = encode_answer(tokenizer, prompt + spaces, answer).input_ids
    assert whole[: len(ids)] == ids
    said = tokenizer.decode(whole[len(ids) :])
    assert said.strip() == answer, "nothing but white space is left to the model"


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [("lamp:", "lamp:"), ("lamp: ", "lamp:"), ("lamp:\n", "lamp:\n"), ("lamp:\n ", "lamp:\n")],
)
def test_white_space_stays_where_no_answer_would_share_a_token_with_it(prompt: str, kept: str) -> None:
    assert encode_prompt(PLAIN, prompt) == PLAIN(kept)["input_ids"]


def test_a_chat_templates_closing_space_stays() -> None:
    chat = chat_format(build_tokenizer(chat_template="{{ messages[0].content }} says: "))
    assert encode_prompt(PLAIN, "Ines says: ", chat) == PLAIN("Ines says: ")["input_ids"]


@pytest.mark.parametrize("answer", ["Ines Tallow", "Ines Tallow<eos>"])
def test_an_answer_is_closed_once(answer: str) -> None:
    span = encode_answer(PLAIN, "Who?", answer, append_eos=True)
    bare = encode_answer(PLAIN, "Who?", "Ines Tallow")
    assert span.input_ids == [*bare.input_ids, PLAIN.eos_token_id]
    assert span.without_closing().input_ids == (bare.input_ids if "<eos>" not in answer else span.input_ids)


def test_tokens_that_close_an_answer_are_known_after_a_cut() -> None:
    tokenizer: PreTrainedTokenizerFast = build_tokenizer(bos=True, chat_template=LLAMA_3)
    chat = chat_format(tokenizer)
    example = Example(chat.prompt("Who?"), "Ines Tallow")
    (span,) = encode(tokenizer, [example], append_eos=True, max_length=None, chat=chat).spans
    assert span.n_closing == 1
    assert span.without_closing() == encode_answer(tokenizer, example.prompt, example.answer, chat=chat)
    n = len(span.input_ids)
    assert [span.cut(length).n_closing for length in (n + 1, n, n - 1, n - 2)] == [1, 1, 0, 0]
    text = "Ines kept the lamp. " * 9
    pieces = cut_document(PLAIN, text, 12, append_eos=True)
    assert [piece.n_closing for piece in pieces] == [0] * (len(pieces) - 1) + [1]
    assert [token for piece in pieces for token in piece.without_closing().input_ids] == PLAIN(text)["input_ids"]
