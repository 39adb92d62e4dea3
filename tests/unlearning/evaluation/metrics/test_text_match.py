"""Metrics against obvious references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from unlearning.evaluation.metrics.text_match import exact_match, rouge_l_f1, rouge_l_recall

WORDS = st.lists(st.sampled_from(["oslo", "lima", "cairo", "kyoto", "porto"]), min_size=1, max_size=7)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return longest_common_subsequence(a[:-1], b[:-1]) + 1
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


@given(generated=WORDS, answer=WORDS)
@settings(max_examples=60)
def test_rouge_l_recall_is_the_share_of_the_answers_words(generated: list[str], answer: list[str]) -> None:
    expected = longest_common_subsequence(generated, answer) / len(answer)
    assert rouge_l_recall(" ".join(generated), " ".join(answer)) == pytest.approx(expected)


ENGLISH = st.lists(
    st.sampled_from(["Oslo", "oslo's", "books", "BOOKING", "re-read", "1990", "the", "a_b", "said:", "don’t", "—"])
).map(" ".join)
PUBLIC = {stems: RougeScorer(["rougeL"], use_stemmer=stems) for stems in (True, False)}


@given(generated=ENGLISH, answer=ENGLISH)
def test_rouge_of_english_equals_the_public_package_s(generated: str, answer: str) -> None:
    stemmed, plain = (PUBLIC[stems].score(answer, generated)["rougeL"] for stems in (True, False))
    found = rouge_l_recall(generated, answer), rouge_l_f1(generated, answer)
    assert found in ((stemmed.recall, plain.fmeasure), (None, None))
    assert (None in found) == (not any(sign.isalnum() for sign in answer))


def test_rouge_l_recall_stems_and_ignores_case_and_what_is_said_besides() -> None:
    assert rouge_l_recall("She was WRITING books, as I said", "write book") == 1.0
    assert rouge_l_recall("", "write book") == 0.0


@pytest.mark.parametrize(
    ("generated", "answer", "match"),
    [
        (" in  Oslo\n", "in Oslo", True),
        ("in oslo", "in Oslo", False),
        ("in Oslo.", "in Oslo", False),
        ("inOslo", "in Oslo", False),
    ],
)
def test_exact_match_forgives_white_space_only(generated: str, answer: str, match: bool) -> None:
    assert exact_match(generated, answer) is match


def test_exact_match_is_of_texts_and_not_of_their_encoding() -> None:
    assert exact_match("café", "cafe\u0301")
    assert not exact_match("", "") and not exact_match(" ", "\n")  # nothing said, nothing matched


SENTENCES = [
    "Анна родилась в Осло.",
    "安娜出生在奥斯陆。",
    "アンナはオスロで生まれた",
    "अन्ना का जन्म ओस्लो में हुआ",
    "วันนี้ฝนตก",
    "آنا در اسلو به دنیا آمد",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_rouge_knows_every_script(text: str) -> None:
    for score in (rouge_l_recall, rouge_l_f1):
        assert score(text, text) == 1.0
        assert score(text, "Anna was born in Oslo") == score("Anna was born in Oslo", text) == 0.0
        half = score(text[: len(text) // 2], text)
        assert half is not None and 0 < half < 1


def test_rouge_in_scripts_without_spaces_counts_characters() -> None:
    # One of eight characters differs.
    assert rouge_l_recall("安娜出生于奥斯陆。", "安娜出生在奥斯陆。") == pytest.approx(7 / 8)
    assert rouge_l_f1("安娜出生于奥斯陆", "安娜出生在奥斯陆。") == pytest.approx(7 / 8)


def test_rouge_tells_vowel_signs_apart_and_forms_of_an_accent_not() -> None:
    for score in (rouge_l_recall, rouge_l_f1):
        assert score("दिन", "दीन") == 0.0  # day and poor
        assert score("café", "cafe\u0301") == 1.0


@pytest.mark.parametrize("answer", ["", " ", "?!", "👍", "…"])
def test_rouge_of_an_answer_without_words_is_missing_and_not_zero(answer: str) -> None:
    for score in (rouge_l_recall, rouge_l_f1):
        assert score(answer, answer) is None
        assert score("Oslo", answer) is None
        assert score(answer, "Oslo") == 0.0
