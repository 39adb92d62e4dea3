"""The table of families in the docs says what a new comparison with plain hooks finds."""

import pytest

from tests.dissect.families import CONFIGURATIONS
from tests.dissect.family_table import PAGE, as_markdown, compare_all, without_numbers

RENEW = "run `python -m tests.dissect.family_table`"


def test_every_configuration_is_in_the_table() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    listed = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")} - {"model"}
    assert listed == set(CONFIGURATIONS), RENEW


@pytest.mark.slow
def test_table_holds_what_plain_hooks_give() -> None:
    found = compare_all()
    supported = [rows for rows in found.values() if not isinstance(rows, str)]
    assert len(supported) >= 70
    gaps = [gap for rows in supported for row in rows for gap in row.gaps.values()]
    assert max(gaps) < 1e-4
    assert without_numbers(as_markdown(found)) == without_numbers(PAGE.read_text(encoding="utf-8")), RENEW


def test_numbers_alone_make_no_difference_to_the_comparison() -> None:
    ours, theirs = "| a | `b` | 0 | 3e-07 *reference* | – 1 |", "| a | `b` | 2e-06 | 0 *reference* | – 1 |"
    assert without_numbers(ours) == without_numbers(theirs) != without_numbers(ours.replace("– 1", "– 2"))
    assert without_numbers(ours) != without_numbers(ours.replace(" *reference*", ""))
