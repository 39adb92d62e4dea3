"""Memorisation against a loop over what is given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.evaluation.metrics.memorisation import exact_memorisation, extraction_strength


def slow_extraction_strength(is_likeliest: list[bool]) -> float:
    n = len(is_likeliest)
    for k in range(n + 1):
        if all(is_likeliest[k:]):
            return 1 - k / n
    raise AssertionError("nothing after k = n can be wrong")


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_extraction_strength_equals_the_loop(is_likeliest: list[bool]) -> None:
    assert extraction_strength(np.array(is_likeliest)) == slow_extraction_strength(is_likeliest)
    assert exact_memorisation(np.array(is_likeliest)) == pytest.approx(is_likeliest.count(True) / len(is_likeliest))


@pytest.mark.parametrize(
    ("tokens", "exact", "strength"),
    [
        ("....", 0, 0),  # nothing: the floor is 0, not 1/n
        ("xxxx", 1, 1),
        ("xxx.", 3 / 4, 0),
        (".xxx", 3 / 4, 3 / 4),
        ("x.xx", 3 / 4, 1 / 2),
        (".", 0, 0),
        ("x", 1, 1),
    ],
)
def test_answers_by_hand(tokens: str, exact: float, strength: float) -> None:
    is_likeliest = np.array([token == "x" for token in tokens])
    assert exact_memorisation(is_likeliest) == exact
    assert extraction_strength(is_likeliest) == strength


def test_no_tokens_have_no_value() -> None:
    assert exact_memorisation(np.array([], dtype=bool)) is None
    assert extraction_strength(np.array([], dtype=bool)) is None


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_knowing_the_end_bounds_knowing_the_whole(is_likeliest: list[bool]) -> None:
    tokens = np.array(is_likeliest)
    strength, exact = extraction_strength(tokens), exact_memorisation(tokens)
    assert strength is not None and exact is not None
    assert 0 <= strength <= exact + 1e-12
