"""Words of every script; for ASCII they are rouge-score's own, which published numbers were made with."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.tokenize import tokenize

from unlearning.evaluation.metrics.text_match import _Words
from unlearning.evaluation.metrics.text_words import has_words, spaced_words, spoken_words

ASCII = st.text(st.characters(max_codepoint=127))
TYPED = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\t\n"), max_size=12)
TYPOGRAPHY = st.text(st.sampled_from("aB 7.,'’‘“”–—…•\u00a0€£©-_/"))
ANY = st.text(st.characters(exclude_categories=("Cn", "Cs")))
"""Characters of a later Unicode than Python's own are letters to one library and unknown to the other."""


@given(ASCII | TYPOGRAPHY)
def test_english_words_are_those_of_rouge_score(text: str) -> None:
    assert spoken_words(text) == tokenize(text, None)
    assert _Words(stems=True).tokenize(text) == tokenize(text, PorterStemmer())


@given(ASCII)
def test_pieces_of_ascii_are_what_stands_between_white_space(text: str) -> None:
    assert spaced_words(text) == text.split()


@given(ANY)
def test_words_hold_every_letter_and_digit_once_in_order(text: str) -> None:
    """The obvious reference: categories of single characters, without any script."""
    lowered = unicodedata.normalize("NFC", text.lower())
    letters = [sign for sign in lowered if unicodedata.category(sign) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl")]
    joined = "".join(spoken_words(text))
    assert [sign for sign in joined if unicodedata.category(sign)[0] != "M"] == letters
    assert all(unicodedata.category(word[0])[0] in "LN" for word in spoken_words(text))
    assert "".join(spaced_words(text)) == "".join(unicodedata.normalize("NFC", text).split())


@given(ANY)
def test_the_form_of_an_accent_makes_no_difference(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert spoken_words(unicodedata.normalize(form, text)) == spoken_words(unicodedata.normalize("NFC", text))
        assert spaced_words(unicodedata.normalize(form, text)) == spaced_words(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Анна родилась в Осло.", ["анна", "родилась", "в", "осло"]),
        ("安娜出生。", ["安", "娜", "出", "生"]),
        ("iPhoneを買うー", ["iphone", "を", "買", "う", "ー"]),
        ("北京2008年", ["北", "京", "2008", "年"]),
        ("นี้", ["นี้"]),
        ("दिन दीन", ["दिन", "दीन"]),
        ("한국어를 배운다", ["한국어를", "배운다"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("שלום עולם", ["שלום", "עולם"]),
        ("❤️ 👍🏽 ?!", []),
        ("", []),
    ],
)
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert spoken_words(text) == words


@given(TYPED, TYPED | st.sampled_from(["Oslo", "a b", "the"]), TYPED, st.booleans())
def test_whole_words_of_english_are_those_between_word_boundaries(
    before: str, phrase: str, after: str, any_case: bool
) -> None:
    text = before + (phrase.upper() if any_case else phrase) + after
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)"
    expected = bool(phrase.split()) and re.search(pattern, text, re.IGNORECASE if any_case else 0) is not None
    assert has_words(text, phrase, any_case=any_case) == expected


@pytest.mark.parametrize(
    ("text", "phrase", "has"),
    [
        ("安娜出生在奥斯陆。", "奥斯陆", True),
        ("安娜出生在奥斯陆。", "奥斯汀", False),
        ("彼はiPhoneを買う", "iphone", True),
        ("彼はiPhone3を買う", "iphone", False),
        ("วันนี้Osloฝนตก", "oslo", True),
        ("वह दिन था", "दिन", True),
        ("वह दिन था", "द", False),
        ("वह दिनों था", "दिन", False),
        ("นี้", "น", False),
        ("Анна родилась в Осло.", "в осло", True),
        ("Анна родилась в Ослоe", "в осло", False),
        ("in cafe\u0301s", "café", False),
        ("a cafe\u0301.", "café", True),
        ("a café.", "cafe", False),
        ("x", " ", False),
    ],
)
def test_whole_words_by_hand(text: str, phrase: str, has: bool) -> None:
    assert has_words(text, phrase, any_case=True) is has
