import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearning.common.errors import InputError, check_at_least, naming, nearest, shortened, with_flags


def test_arguments_in_backticks_become_flags_and_others_keep_their_name() -> None:
    message = "`batch_size` must be at least 1, got 0; see `learning_rate` and `a b`"
    shown = with_flags(message, {"batch_size": "--batch-size"})
    assert shown == "--batch-size must be at least 1, got 0; see learning_rate and `a b`"


def test_an_argument_that_is_switched_off_becomes_its_flag() -> None:
    flags = {"vectors": "--vectors", "vectors=False": "--no-vectors"}
    assert with_flags("leave `vectors` out (`vectors=False`, `x=False`)", flags) == (
        "leave --vectors out (--no-vectors, x=False)"
    )


def test_a_number_below_its_minimum_is_refused_by_name() -> None:
    check_at_least("seed", 0, 0)
    with pytest.raises(InputError, match="`seed`.*0.*-1"):
        check_at_least("seed", -1, 0)


def test_a_similar_name_is_offered() -> None:
    assert "'npo'" in nearest("nppo", ["npo", "dpo"])
    assert nearest("something", ["npo"]) == ""


@pytest.mark.parametrize(
    ("message", "named"),
    [("no.json: no such file", "`forget`: no.json: no such file"), ("`limit` must be 1", "`limit` must be 1")],
)
def test_naming_puts_the_argument_before_a_message_that_names_none(message: str, named: str) -> None:
    with pytest.raises(InputError) as caught, naming("forget"):
        raise InputError(message)
    assert str(caught.value) == named


@pytest.mark.parametrize("value", ["x" * 100_000, "x " * 50_000, "a'b" * 40_000, "a\"b'c " * 40_000, "\\'" * 40_000])
def test_a_long_argument_is_shortened_and_what_to_do_stays(value: str) -> None:
    for quoted, most in ((repr(value), 300), (f"'{value}'", 1550)):
        message = shortened(f"`sites` must be sites, got {quoted}; leave it out")
        assert message.startswith("`sites` must be sites, got '") or message.startswith('`sites` must be sites, got "')
        assert message.endswith("; leave it out") and len(message) < most


def test_a_long_name_is_shortened_without_quotation_marks() -> None:
    message = shortened(f"{'x' * 300}.json: no such file")
    assert len(message) < 130 and message.startswith("xxx") and message.endswith("xx.json: no such file")
    path = "/home/" + "a/" * 100 + "b.json"
    assert shortened(f"{path}: no such file") == f"{path}: no such file"


def test_apostrophes_are_no_quotation_marks() -> None:
    message = (
        f"the base's weights and {'many words ' * 20} the control's, the models' and a 'quoted' word of the base's"
    )
    assert shortened(message) == message


@given(st.text(st.sampled_from("'\" a.,"), max_size=6000))
def test_no_message_is_longer_than_1503_characters(text: str) -> None:
    assert len(shortened(text)) <= min(1503, max(len(text), 100))
    assert shortened(text[:120]) == text[:120]


def test_marks_without_end_take_no_time() -> None:
    started = time.process_time()
    shortened("'a " * 1_000_000)
    shortened("'" * 1_000_000)
    assert time.process_time() - started < 1
