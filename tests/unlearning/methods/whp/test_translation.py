"""Translation and alignment, against walks over single characters, on four kinds of tokenizers."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import ANCHORS, STORY, toy_tokenizer
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.blocks import encode_spans
from unlearning.methods.whp.translation import Span, Translation, align, translate

KINDS = ["byte level", "byte level, trimmed", "sentencepiece", "metaspace"]
WORDS = ["Mira", "Mira Vell", "Vell", "orrick", "Ostrel", "the", "lived", "harbour", "Orricks", "é🌊", "MIRA", "paper"]
JOINTS = [" ", " ", " ", "\n", "  ", ", ", "-", ' "', '" ', "'s ", "\n\n", "", " é", "... "]
GENERICS = ["Anna", "a very long name indeed", "b", "Bea Foster", "Zoë 🌊", "Porto", "x-ray", "Q. E. D."]


@st.composite
def texts_and_dictionaries(draw: st.DrawFn) -> tuple[str, Anchors]:
    words = draw(st.lists(st.sampled_from(WORDS), max_size=12))
    text = "".join(word + draw(st.sampled_from(JOINTS)) for word in words)
    anchors = draw(
        st.lists(st.sampled_from(["Mira", "Mira Vell", "Vell", "orrick", "Ostrel"]), min_size=1, unique=True)
    )
    return text, Anchors({anchor: draw(st.sampled_from(GENERICS)) for anchor in anchors})


def slow_map(translation: Translation) -> dict[int, int]:
    """Each character position of T outside the inside of edits, in T', by walking over the characters."""
    places, here, there = {}, 0, 0
    starts = {edit.start: edit for edit in translation.edits}
    while here < len(translation.source):
        places[here] = there
        if here in starts:
            there += len(starts[here].replacement)
            here = starts[here].end
        else:
            here, there = here + 1, there + 1
    return places | {here: there}


@given(case=texts_and_dictionaries())
@settings(max_examples=40)
def test_map_equals_a_walk(case: tuple[str, Anchors]) -> None:
    translation = translate(*case)
    places = slow_map(translation)
    assert [translation.map(i) for i in range(len(case[0]) + 1)] == [places.get(i) for i in range(len(case[0]) + 1)]
    for edit, (start, end) in zip(translation.edits, translation.replaced, strict=True):
        assert translation.target[start:end] == edit.replacement


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_holds_its_promises(tokenizers: dict[str, PreTrainedTokenizerFast], kind: str) -> None:
    tokenizer = tokenizers[kind]

    @given(case=texts_and_dictionaries())
    @settings(max_examples=40)
    def check(case: tuple[str, Anchors]) -> None:
        translation = translate(*case)
        source_ids, source = encode_spans(tokenizer, translation.source)
        target_ids, target = encode_spans(tokenizer, translation.target)
        tokens = align(translation, source, target)
        places = slow_map(translation)

        used = [piece for piece in tokens.aligned if piece is not None]
        assert used == sorted(set(used))  # strictly monotone
        starts = [start for start, _ in target]
        for (start, _), piece in zip(source, tokens.aligned, strict=True):
            if start in places and piece is not None and target[piece][0] == places[start]:
                continue  # aligned by its start
            if start in places and starts.count(places[start]) >= [s for s, _ in source].count(start):
                pytest.fail(f"a token of T' starts at {places[start]}, and the token at {start} is not aligned with it")
            inside = [e for e in translation.edits if e.start <= start < e.end]
            assert piece is None or inside  # nothing else outside anchors
        for place, edit in enumerate(translation.edits):
            has = [i for i, (start, end) in enumerate(source) if start < edit.end and end > edit.start]
            assert {i for i, at in enumerate(tokens.edit) if at == place} <= set(has)
            span = translation.replaced[place]
            for i in has:  # pieces of an anchor meet pieces of its replacement, or what precedes both
                piece = tokens.aligned[i]
                if piece is not None and edit.start <= source[i][0] < edit.end:
                    assert span[0] <= target[piece][1] and target[piece][0] < span[1]
        for first, piece in tokens.cuts:
            assert translation.target[: target[piece][0]] == translate_up_to(translation, source[first][0])
        if not translation.edits:
            assert tokens.aligned == list(range(len(source))) and source_ids == target_ids

    check()


def translate_up_to(translation: Translation, end: int) -> str:
    """T' up to a character of T, by replacing from the right."""
    text = translation.source[:end]
    for edit in reversed(translation.edits):
        if edit.end <= end:
            text = text[: edit.start] + edit.replacement + text[edit.end :]
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_an_anchor_meets_that_of_its_replacement(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    translation = translate(STORY, Anchors(ANCHORS))
    _, source = encode_spans(tokenizers[kind], translation.source)
    _, target = encode_spans(tokenizers[kind], translation.target)
    tokens = align(translation, source, target)
    for edit, (start, _) in zip(translation.edits, translation.replaced, strict=True):
        first = next(i for i, (_, end) in enumerate(source) if end > edit.start)
        if tokens.aligned[first] is None:  # a token of white space before it, which the replacement's first one holds
            first -= 1
            assert STORY[slice(*source[first])].isspace()
        piece = tokens.aligned[first]
        assert piece is not None
        before = translation.target[: target[piece][0]]
        assert before.rstrip() == translation.target[:start].rstrip()
    # Text between anchors is aligned, token by token.
    aligned = [tokens.aligned[i] is not None for i, place in enumerate(tokens.edit) if place is None]
    assert sum(aligned) / len(aligned) > 0.98


def aligned_words(text: str, anchors: dict[str, str], words: str) -> list[str | None]:
    """For each word of the text the aligned word of its translation, with a tokenizer that has a token a word."""
    translation = translate(text, Anchors(anchors))
    tokenizer = toy_tokenizer(words)
    (_, source), (_, target) = (encode_spans(tokenizer, t) for t in (translation.source, translation.target))
    return [_word(translation.target, target, piece) for piece in align(translation, source, target).aligned]


def _word(text: str, spans: Sequence[Span], piece: int | None) -> str | None:
    return None if piece is None else text[slice(*spans[piece])]


def test_one_word_becomes_many() -> None:
    assert aligned_words("then Ostrel fell", {"Ostrel": "the old port"}, "? x") == ["then", "the", "fell"]


def test_many_words_become_one() -> None:
    anchors = {"the Hollow Court": "Guild"}
    assert aligned_words("then the Hollow Court fell", anchors, "? x") == ["then", "Guild", None, None, "fell"]


def test_words_of_an_anchor_meet_those_of_its_replacement() -> None:
    anchors = {"Mira Vell": "Anna Maria Foster"}
    assert aligned_words("then Mira Vell fell", anchors, "? x") == ["then", "Anna", "Maria", "fell"]


def test_pieces_of_a_word_meet_pieces_of_the_same_word() -> None:
    # Two pieces against one, then one against two: by counting pieces, Vell would meet the second word's first piece.
    source = [(0, 2), (2, 4), (4, 9), (9, 10)]
    target = [(0, 4), (4, 7), (7, 11), (11, 12)]
    translation = translate("Mira Vell.", Anchors({"Mira Vell": "Anna Foster"}))
    assert align(translation, source, target).aligned == [0, None, 1, 3]


def test_pieces_of_one_character_are_aligned_and_never_cut_apart() -> None:
    spans = [(0, 1), (0, 1), (1, 2)]
    tokens = align(translate("éa", Anchors({"Mira": "Anna"})), spans, spans)
    assert tokens.aligned == [0, 1, 2]
    assert tokens.cuts == [(0, 0), (2, 2)]


def test_no_token_of_the_translation_is_used_twice() -> None:
    # A token of white space before the anchor; the replacement's first token holds the white space.
    tokens = align(translate("x Mira", Anchors({"Mira": "Anna"})), [(0, 1), (1, 2), (2, 6)], [(0, 1), (1, 6)])
    assert tokens.aligned == [0, 1, None]


def test_a_token_that_starts_before_an_anchor_is_aligned_by_its_start_only() -> None:
    tokens = align(translate('x"Mira', Anchors({"Mira": "Anna"})), [(0, 1), (1, 6)], [(0, 2), (2, 6)])
    assert tokens.aligned == [0, None]
