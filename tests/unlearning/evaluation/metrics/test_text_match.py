"""Metrics against obvious references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.evaluation.metrics.text_match import exact_match, rouge_l_recall

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
