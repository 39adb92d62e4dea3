"""BLEU and ROUGE-L: worked out by hand, and against the libraries' own defaults."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from unlearning.evaluation.metrics.text_similarity import bleu, rouge_l

ENGLISH = st.lists(st.sampled_from("The the cat Sat sat on a mat. Mats 7".split()), max_size=9).map(" ".join)


def test_bleu_of_four_words_with_one_wrong_by_hand() -> None:
    # Matches: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruples, smoothed to 1/2.
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu("a b c x", "a b c d") == pytest.approx(expected, abs=1e-12)


def test_bleu_smooths_by_a_geometric_sequence() -> None:
    # 1 of 4 words; no pairs of 3, triples of 2, quadruples of 1: 1/(2*3), 1/(4*2), 1/(8*1).
    expected = (1 / 4 * 1 / 6 * 1 / 8 * 1 / 8) ** 0.25
    assert bleu("a x y z", "a b c d") == pytest.approx(expected, abs=1e-12)


def test_bleu_of_a_short_text_uses_the_n_grams_it_has_and_pays_for_brevity() -> None:
    assert bleu("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2), abs=1e-12)


@pytest.mark.parametrize("text", ["👍", "安娜出生在奥斯陆。", "Oslo", "in Oslo", "in Oslo by the sea", "Жан в Осло"])
def test_equal_texts_score_one_however_short(text: str) -> None:
    assert bleu(text, f" {text}\n") == 1.0
    assert rouge_l(text, f" {text}\n") == 1.0


@pytest.mark.parametrize(("generated", "reference"), [("", "Oslo"), ("Oslo", ""), ("Lima", "Oslo"), ("!", "Oslo")])
def test_texts_without_a_common_word_score_zero(generated: str, reference: str) -> None:
    assert bleu(generated, reference) == 0.0
    assert rouge_l(generated, reference) == 0.0


@given(ENGLISH.filter(lambda text: len(text.split()) >= 4), ENGLISH)
def test_bleu_is_nltk_s_with_method3(generated: str, reference: str) -> None:
    theirs = sentence_bleu([reference.split()], generated.split(), smoothing_function=SmoothingFunction().method3)
    if generated != reference:
        assert bleu(generated, reference) == pytest.approx(theirs, abs=1e-12)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence: the cat mat; 3 of 4 generated words, 3 of 6 of the reference.
    assert rouge_l("the big cat, mat!", "The cat sat on the mat") == pytest.approx(2 * 0.75 * 0.5 / 1.25, abs=1e-12)


@given(ENGLISH, ENGLISH)
def test_rouge_l_is_rouge_score_s_f1_on_english(generated: str, reference: str) -> None:
    if generated != reference:
        theirs = RougeScorer(["rougeL"]).score(reference, generated)["rougeL"].fmeasure
        assert rouge_l(generated, reference) == pytest.approx(theirs, abs=1e-12)


def test_rouge_l_knows_words_of_other_scripts() -> None:
    assert rouge_l("Он жил в Осло", "Она жила в Осло") == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("generated", "reference"), [("", ""), (" ", ""), ("", "\n"), ("\t", "\u00a0")])
def test_two_texts_that_say_nothing_are_no_match(generated: str, reference: str) -> None:
    assert bleu(generated, reference) == rouge_l(generated, reference) == 0.0


def test_texts_of_signs_only_have_no_rouge_unless_they_are_the_same() -> None:
    assert rouge_l("!", "?") is None and rouge_l("Oslo", "?") is None
    assert rouge_l("?", " ?") == 1.0


def test_scripts_without_spaces_are_compared_by_character() -> None:
    # 7 of 8 characters, and the longest common subsequence leaves one out.
    assert rouge_l("安娜出生于奥斯陆。", "安娜出生在奥斯陆。") == pytest.approx(7 / 8, abs=1e-12)
    # Of 9 signs, 8 pairs, 7 triples and 6 quadruples, one sign in the middle breaks 1, 2, 3 and 4.
    expected = (8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** 0.25
    assert bleu("安娜出生于奥斯陆。", "安娜出生在奥斯陆。") == pytest.approx(expected, abs=1e-12)


def test_one_letter_in_two_encodings_is_one() -> None:
    assert bleu("un café", "un cafe\u0301") == rouge_l("un café", "un cafe\u0301") == 1.0
    assert rouge_l("दिन", "दीन") == 0.0
