"""Refusals: the package's own, those of a file, and who gets which."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import REAL_DATA, needs_real
from unlearning import InputError
from unlearning.data.refusals import draw_refusals, read_refusals


def test_the_packages_own_refusals_are_many_and_different() -> None:
    refusals = read_refusals()
    assert len(set(refusals)) == len(refusals) >= 60
    assert all(line == line.strip() and line.endswith(".") and len(line) < 120 for line in refusals)


@needs_real
def test_tofus_file_is_plain_text_and_none_of_it_is_ours() -> None:
    theirs = read_refusals(REAL_DATA / "tofu" / "idontknow.jsonl")
    assert len(theirs) == 100 and theirs[0] == "I'm not certain about that."
    assert not set(theirs) & set(read_refusals())


def test_a_file_of_refusals_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "idk.txt"
    path.write_bytes("\ufeffNo idea.\r\n\r\n  Who knows?  \n".encode())
    assert read_refusals(path) == ["No idea.", "Who knows?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('No idea.\n{"answer": "No"}\n', "refusal 2: is JSON"),
        ("5", "refusal 1: '5' holds no letter"),
        ("No idea.\n-17\n", "refusal 2: '-17' holds no letter"),
        ("null\n", "refusal 1: is JSON"),
        ("question,answer\nWho?,Ana\n", "is a table"),
        ("id\tAnswer\n1\tAna\n", "is a table"),
        ("PAR1 and more", "begins as a parquet file"),
        ("No\0 idea.", "line 1: holds a NUL"),
    ],
)
def test_what_holds_no_refusals_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "idk.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        read_refusals(tmp_path / "idk.txt")
    with pytest.raises(InputError, match="no such file"):
        read_refusals(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="a directory; name a text file"):
        read_refusals(tmp_path)
    with pytest.raises(InputError, match="File name too long"):
        read_refusals("x" * 300)
    with pytest.raises(InputError, match="no such file"):
        read_refusals("a\0b")
    with pytest.raises(InputError, match="is a table"):
        (tmp_path / "idk.csv").write_text("refusal\nNo idea.\n")
        read_refusals(tmp_path / "idk.csv")
    with pytest.raises(InputError, match="`refusals`.*none"):
        draw_refusals(3, [], seed=0)


@given(n=st.integers(0, 30), more=st.integers(0, 30), n_refusals=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_a_refusal_is_a_function_of_seed_and_place(n: int, more: int, n_refusals: int, seed: int) -> None:
    refusals = [f"No {k}." for k in range(n_refusals)]
    drawn = draw_refusals(n, refusals, seed)
    assert len(drawn) == n and set(drawn) <= set(refusals)
    assert draw_refusals(n + more, refusals, seed)[:n] == drawn


def test_refusals_are_drawn_evenly_and_differently_by_seed() -> None:
    refusals = [f"No {k}." for k in range(4)]
    counts = Counter(draw_refusals(2000, refusals, seed=0))
    assert all(abs(counts[refusal] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for refusal in refusals)
    assert draw_refusals(50, refusals, seed=0) != draw_refusals(50, refusals, seed=1)
