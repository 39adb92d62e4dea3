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


TOO_LARGE = {
    "a count without end": "a{999999999}",
    "counts of counts": "(a{9999}){9999}",
    "counts in counts in counts": "(?:(?:(?:a{30}){30}){30})",
    "a count in brackets": "((((a){99})){99}){99}",
    "a count after a set": "(a{999}[(]){999}",
    "a count after a set that begins with a bracket": "(a{999}[](]){999}",
    "a count after a comment": "(a{999}(?#(()){999}",
    "a count behind an escape": r"(a{999}\\(){999}",
    "an open count": "(a{999,}){99,}",
    "repeats of repeats": "(?:" * 22 + "a" + ")+" * 22,
    "a verbose comment": "(?x)(a{999} #(\n){999}",
    "sets in sets": "(?V1)(a{999}[[a](]){999}",
    "recursion": "(?R)",
    "recursion after a set": "[]](?R)",
    "recursion of a group": "(a(?1)?b)",
    "relative recursion": "(a(?-1)?b)",
    "recursion of a name": "(?P<a>b(?P>a)?)",
    "definitions": "(?(DEFINE)(?<a>(?&a)(?&a)))(?&a)",
    "a long number": "x{1," + "9" * 3900 + "}",
    "a longer number": "x{1," + "9" * 5000 + "}",
    "an escaped number": "x{" + "1" * 3900 + "}",
    "alternatives": "|".join(f"layer{n}" for n in range(100_000)),
    "brackets": "(" * 1900 + "a" + ")" * 1900,
    "sets without end": "[" * 3000,
    "fuzzy": "(?:abc){e<=" + "9" * 3000 + "}",
    "a lone backslash": "\\",
    "surrogates": "(\ud800",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_cannot_be_compiled_in_bounded_time_and_memory_is_refused_with_a_reason(name: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError) as error:
        searcher("parameters", TOO_LARGE[name])
    assert time.process_time() - started < 1
    message = str(error.value)
    assert message.startswith("`parameters` must be a regular expression")
    assert "\n" not in message and len(message) < 600 and message.rpartition(": ")[2].strip()


@given(
    st.recursive(
        st.sampled_from(["a", ".", r"\w", "[a-z(]", "[])]", r"\(", r"\)", "(?#()", "mlp"]),
        lambda part: st.tuples(
            st.sampled_from(["(", "(?:", "(?=", "(?i:", "(?>"]),
            st.lists(part, min_size=1, max_size=3).map("".join),
            st.sampled_from([")", ")*", ")?", ")+", "){3}", "){0}", "){2,}", "){1,4}", "){,5}", ")*?", ")++", "|b)"]),
        ).map("".join),
        max_leaves=8,
    )
)
def test_small_expressions_of_every_form_are_python_s(text: str) -> None:
    names = NAMES[:2]
    wanted = [bool(re.search(text, name)) for name in names]
    assert list(map(searcher("parameters", text), names)) == wanted


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), ValueError()])
def test_whatever_ends_a_match_has_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def search(self, _name: str, timeout: float) -> None:  # noqa: ARG002
            raise error

        fullmatch = search

    monkeypatch.setattr(patterns.regex, "compile", lambda _text: Broken())
    with pytest.raises(InputError, match=r"`a` must be .* fails on 'mlp': \w"):
        searcher("a", "b")("mlp")


def test_all_names_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def search(self, _name: str, timeout: float) -> None:
            time.sleep(min(timeout, 0.02))
            if timeout < 0.02:
                raise TimeoutError

    monkeypatch.setattr(patterns.regex, "compile", lambda _text: Slow())
    monkeypatch.setattr(patterns, "TOTAL_S", 0.1)
    matches = searcher("a", "b")
    with pytest.raises(InputError, match=r"more than 0.1 s on the names up to 'mlp"):
        for layer in range(6):
            matches(f"mlp{layer}")
