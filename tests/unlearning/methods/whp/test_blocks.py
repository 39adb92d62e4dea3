"""Blocks: nothing lost, nothing cut apart, second occurrences and uses where a walk finds them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import ANCHORS, BACKGROUND, STORY, toy_tokenizer
from tests.unlearning.methods.whp.test_translation import KINDS, texts_and_dictionaries
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.blocks import Block, cut_blocks, encode_spans
from unlearning.methods.whp.translation import translate


def test_blocks_hold_the_whole_text_and_the_whole_translation(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        opening = 1 if kind == "sentencepiece" else 0
        for size in (24, 48, 4096):
            blocks = cut_blocks(tokenizer, [STORY, BACKGROUND], Anchors(ANCHORS), block_size=size)
            sources = [token for block in blocks for token in block.source[opening:]]
            targets = [token for block in blocks for token in block.target[opening:]]
            translated = [translate(text, Anchors(ANCHORS)).target for text in (STORY, BACKGROUND)]
            assert sources == [token for text in (STORY, BACKGROUND) for token in encode_spans(tokenizer, text)[0]]
            assert targets == [token for text in translated for token in encode_spans(tokenizer, text)[0]]
            assert all(2 <= len(block.source) <= size and len(block.target) <= size for block in blocks)
            assert len(blocks) == 2 if size == 4096 else len(blocks) > 4
            if opening:
                assert all(block.source[0] == block.target[0] == tokenizer.bos_token_id for block in blocks)
                assert all(block.reasons[0] == "start" and block.aligned[:2] == (0, 1) for block in blocks)


def shown_by(piece: str, anchors: Anchors) -> set[str]:
    """The anchors of one word that a reader of an occurrence has seen."""
    return {anchor for anchor in anchors.generics if anchor in piece.split()}


@given(case=texts_and_dictionaries(), size=st.integers(30, 80))
@settings(max_examples=40)
def test_reasons_equal_a_walk_over_tokens(
    tokenizers: dict[str, PreTrainedTokenizerFast], case: tuple[str, Anchors], size: int
) -> None:
    text, anchors = case
    tokenizer = tokenizers["sentencepiece"]  # a BOS token predicts the first one of every block
    try:
        blocks = cut_blocks(tokenizer, [text], anchors, block_size=size)
    except InputError as error:
        assert "changes nothing" in str(error) or "are empty" in str(error)
        assert not anchors.find(text)
        return
    _, spans = encode_spans(tokenizer, text)
    place = 0
    for block in blocks:
        assert [a for a in block.aligned if a is not None] == sorted({a for a in block.aligned if a is not None})
        seen: set[str] = set()  # anchors that the context shows, alone or within others
        before: set[str] = set()  # those of them when the present occurrence began
        occurrences: list[int] = []
        n_uses = 0
        assert block.source[0] == tokenizer.bos_token_id and block.reasons[0] == "start"
        for token in range(1, len(block.source)):
            start, end = spans[place + token - 1]
            inside = [e for e in anchors.find(text) if start < e.end and end > e.start][:1]
            assert block.anchors[token] == (inside[0].anchor if inside else "")
            repeat = False
            for edit in inside:
                if edit.start not in occurrences:
                    occurrences.append(edit.start)
                    before = set(seen)
                    n_uses += edit.anchor not in before
                    seen |= shown_by(text[edit.start : edit.end], anchors) | {edit.anchor}
                piece = text[edit.start : edit.end]
                places = [
                    (edit.start + at, edit.start + at + len(name))
                    for name in before & set(piece.split())
                    for at in [piece.index(name)]
                ]
                repeat = edit.anchor in before or any(start < b and end > a for a, b in places)
            missing = "" if block.aligned[token] is not None else "anchor" if inside else "unaligned"
            assert block.reasons[token] == ("repeat" if repeat else missing)
        assert len(block.uses) == n_uses
        assert block.n_occurrences == len(occurrences)
        place += len(block.source) - 1
    assert place == len(spans)


def toy_block(text: str, anchors: dict[str, str], words: str) -> tuple[Block, PreTrainedTokenizerFast]:
    tokenizer = toy_tokenizer(words)
    (block,) = cut_blocks(tokenizer, [text], Anchors(anchors), block_size=64)
    return block, tokenizer


def test_uses_begin_at_the_last_token_of_the_first_occurrence() -> None:
    words = "? Mira Vell Anna Foster saw and the Guild Hollow Court"
    text = "Mira Vell saw the Hollow Court and Mira Vell"
    block, tokenizer = toy_block(text, {"Mira Vell": "Anna Foster", "the Hollow Court": "the Guild"}, words)
    assert [use.token for use in block.uses] == [1, 5]
    # "the" is the anchor's as well as the counterpart's, so it is not what tells them apart.
    firsts = [tokenizer.convert_ids_to_tokens(list(use.first_tokens)) for use in block.uses]
    assert firsts == [["Anna"], ["Guild"]]
    assert block.reasons == ("start", "", "", "", "", "anchor", "", "repeat", "repeat")


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        # "Vell" has been read in "Mira Vell": its label would ask for another name of what the context shows.
        ("Mira Vell saw Vell", ("start", "", "", "repeat")),
        ("saw Vell and Mira Vell", ("start", "", "", "", "repeat")),
        ("saw Vell and Mira", ("start", "", "", "")),
        ("saw Mira Vell and Mira Vell", ("start", "", "", "", "repeat", "repeat")),
    ],
)
def test_an_anchor_within_another_has_been_seen_with_it(text: str, reasons: tuple[str, ...]) -> None:
    words = "? Mira Vell Anna Foster Bea saw and"
    block, _ = toy_block(text, {"Mira Vell": "Anna Foster", "Vell": "Foster", "Mira": "Bea"}, words)
    assert block.reasons == reasons


def test_first_tokens_are_those_with_and_without_a_space(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["byte level"]
    (block,) = cut_blocks(tokenizer, ["So Mira ran."], Anchors({"Mira": "the boats"}), block_size=64)
    wanted = {tokenizer.encode("the boats")[0], tokenizer.encode(" the boats")[0]}
    assert len(wanted) == 2 and block.uses[0].first_tokens == wanted
    tokenizer = tokenizers["sentencepiece"]
    (block,) = cut_blocks(tokenizer, ["So Mira ran."], Anchors({"Mira": "Zed"}), block_size=64)
    # The mark of white space, which is a token of its own before what the vocabulary does not have, is not lowered.
    assert tokenizer.convert_tokens_to_ids("▁") not in block.uses[0].first_tokens
    assert len(block.uses[0].first_tokens) == 1


def test_an_anchor_is_not_cut_apart() -> None:
    words = "? a b Mira Vell Anna Foster"
    blocks = cut_blocks(
        toy_tokenizer(words), ["a b Mira Vell a b a"], Anchors({"Mira Vell": "Anna Foster"}), block_size=3
    )
    assert [block.source for block in blocks] == [(1, 2), (3, 4, 1), (2, 1)]
    assert [block.target for block in blocks] == [(1, 2), (5, 6, 1), (2, 1)]
    with pytest.raises(InputError, match="does not fit into 2 tokens"):
        cut_blocks(toy_tokenizer(words), ["a Mira Vell Mira"], Anchors({"Mira": "a b Anna"}), block_size=2)


def test_a_last_token_that_nothing_predicts_is_left_out() -> None:
    tokenizer = toy_tokenizer("? a b Mira Anna")
    blocks = cut_blocks(tokenizer, ["a b Mira b a"], Anchors({"Mira": "Anna"}), block_size=2)
    assert [block.source for block in blocks] == [(1, 2), (3, 2)]


def test_a_single_token_behind_a_bos_token_is_kept(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    (block,) = cut_blocks(tokenizer, ["Mira"], Anchors({"Mira": "boats"}), block_size=8)
    assert tokenizer.convert_ids_to_tokens(list(block.source)) == ["<s>", "▁Mira"]
    assert block.reasons == ("start", "")


@pytest.mark.parametrize(
    ("texts", "anchors", "size", "message"),
    [
        (["a b"], {"Mira": "Anna"}, 8, "the anchor dictionary changes nothing: none of its 1 anchors"),
        ([" ", ""], {"Mira": "Anna"}, 8, "the texts are empty"),
        (["Mira"], {"Mira": "Anna"}, 8, "the texts are one token each"),
        (["Mira"], {"Mira": "Anna"}, 1, "`block_size` must be at least 2, got 1"),
    ],
)
def test_bad_input_is_one_line(texts: list[str], anchors: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(InputError) as refused:
        cut_blocks(toy_tokenizer("? a b Mira Anna"), texts, Anchors(anchors), block_size=size)
    assert message in str(refused.value) and "\n" not in str(refused.value)
