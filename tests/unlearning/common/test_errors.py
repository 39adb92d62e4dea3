import pytest

from unlearning.common.errors import InputError, check_at_least, naming, nearest, with_flags


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
