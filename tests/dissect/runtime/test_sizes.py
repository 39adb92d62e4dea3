"""Sizes in bytes, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.runtime.sizes import in_bytes, parse_bytes
from unlearning.common.errors import InputError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10MB", 10**7),
        ("6GiB", 6 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("1.5gb", 1_500_000_000),
        ("800 M", 8 * 10**8),
        ("2k", 2000),
        ("2Ki", 2048),
        ("0.5 TiB", 2**39),
        ("123456", 123456),
        ("7B", 7),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "text", ["", "lots", "-1GB", "0", "0.1B", "GB", "5 XB", "5GBB", "nan", "inf", "1e400", "5 5GB x"]
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InputError, match="max_memory.*6GiB"):
        parse_bytes(text)


@given(st.integers(1000, 10**13))
def test_a_size_is_written_so_that_it_reads_back_nearly_and_upwards_where_asked(number: int) -> None:
    assert abs(parse_bytes(in_bytes(number)) - number) <= 0.05 * number
    assert parse_bytes(in_bytes(number, up=True)) >= number
    assert parse_bytes(in_bytes(number, up=True)) <= 1.1 * number


def test_sizes_are_short() -> None:
    assert [in_bytes(number) for number in (0, 999, 1000, 1_550_000, 6_442_450_944)] == [
        *["0 bytes", "999 bytes", "1 kB", "1.6 MB", "6.4 GB"]
    ]
