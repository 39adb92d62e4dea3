"""Regular expressions of users: broken ones are refused, and none can hang."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearning.common import patterns
from unlearning.common.errors import InputError
from unlearning.common.patterns import searcher

NAMES = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", ""]


@given(st.text("abm.lp_()[]|*+?\\d01^$", max_size=12))
def test_it_is_python_s_own_search(text: str) -> None:
    try:
        ours: list[bool] | None = [bool(re.search(text, name)) for name in NAMES]
    except re.error:
        ours = None
    try:
        theirs: list[bool] | None = list(map(searcher("parameters", text), NAMES))
    except InputError as error:
        assert str(error).startswith("`parameters` must be a regular expression, got ")
        theirs = None
    assert ours is None or theirs == ours


@pytest.mark.parametrize("text", [r"^(a+)+$", r"(.*a){30}$", r"(?:[a-z]+\s?)+!$"])
def test_what_takes_for_ever_is_refused_in_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.1)
    matches = searcher("train_parameters", text)
    started = time.monotonic()
    try:
        matches("a" * 5000 + ".")
    except InputError as error:
        assert "`train_parameters` must be a regular expression that ends" in str(error) and "\n" not in str(error)
    assert time.monotonic() - started < 20


def test_a_name_is_matched_in_part_or_whole() -> None:
    assert searcher("a", "up_proj")(NAMES[0])
    assert not searcher("a", "up_proj", whole=True)(NAMES[0])
    assert searcher("a", r".*up_proj.*", whole=True)(NAMES[0])
