"""Benchmarks by name: their options, and what is not one of them."""

import pytest

from unlearning import InputError, list_benchmarks
from unlearning.cli.eval import COMMANDS
from unlearning.evaluation.catalogue import BENCHMARKS, settings_of


def test_every_benchmark_has_a_command_and_describes_every_option() -> None:
    listed = list_benchmarks()
    assert [each["name"] for each in listed] == list(BENCHMARKS)
    assert set(COMMANDS) == set(BENCHMARKS)
    for each in listed:
        assert each["summary"] and each["source"]
        assert all(option["help"] for option in each["options"])
        assert {"seed", "limit"} <= {option["name"] for option in each["options"]}


def test_what_is_handed_out_is_a_copy() -> None:
    list_benchmarks("tofu")[0]["options"].clear()
    assert list_benchmarks("tofu")[0]["options"]


def test_unknown_benchmarks_and_options_and_missing_ones_are_refused() -> None:
    with pytest.raises(InputError, match="`benchmark`.*'tofi'.*'tofu'"):
        list_benchmarks("tofi")
    with pytest.raises(InputError, match="tofu.*'forgot'.*'forget'"):
        settings_of("tofu", {"forgot": "forget01"})
    with pytest.raises(InputError, match="mia.*`forget`, `holdout`"):
        settings_of("mia", {})
