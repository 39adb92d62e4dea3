"""`python -m benchmarks.verdict`: seconds go to the test and the model that spent them."""

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.verdict.clock import ALL_MODELS, REST, cost_of, split_by_model
from benchmarks.verdict.command import against, main, medians, reference
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry
from tests.benchmarks.helpers import assert_refused
from tests.command_lines import call_main


@dataclass(frozen=True)
class FakeCase:
    """Roles of a case, and the one that is attacked."""

    models: dict[str, None]
    only: str | None = None


CASE = FakeCase({"base": None, "unlearned": None})
SECONDS = {None: 0.2, "base": 0.05, "unlearned": 0.1}


def burn(seconds: float) -> None:
    """Keep a core busy for so many CPU seconds."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def run_catalogue() -> None:
    """What a verdict does: every test of the catalogue under one budget, and a little more."""
    for entry in catalogue.entries(None):
        entry.runs["quick"](CASE)  # type: ignore[arg-type]
    burn(0.1)


@pytest.fixture
def two_tests(monkeypatch: pytest.MonkeyPatch) -> Any:
    def entry(name: str, factor: int, *, compares_models: bool) -> Entry:
        run: Any = lambda case: burn(factor * SECONDS[case.only])  # noqa: E731
        return Entry(name, {"quick": run}, compares_models=compares_models)

    def entries(_paraphrases: object) -> tuple[Entry, ...]:
        return entry("attack", 1, compares_models=False), entry("comparison", 2, compares_models=True)

    monkeypatch.setattr(catalogue, "entries", entries)
    return entries


def test_seconds_of_a_verdict_go_to_its_tests(two_tests: Any) -> None:
    cost = cost_of(run_catalogue)
    assert cost.tests["attack"] == pytest.approx(0.2, abs=0.05)
    assert cost.tests["comparison"] == pytest.approx(0.4, abs=0.05)
    assert cost.tests[REST] == pytest.approx(0.1, abs=0.05)
    assert sum(cost.tests.values()) == pytest.approx(cost.cpu_s)
    assert catalogue.entries is two_tests, "the catalogue is put back"


@pytest.mark.usefixtures("two_tests")
def test_seconds_of_a_test_go_to_its_models() -> None:
    spent = split_by_model(run_catalogue)
    assert spent["attack"] == pytest.approx({"base": 0.05, "unlearned": 0.1}, abs=0.03)
    assert spent["comparison"] == pytest.approx({ALL_MODELS: 0.4}, abs=0.05)


def test_medians_are_taken_test_by_test() -> None:
    def cost(cpu_s: float, **tests: float) -> dict[str, Any]:
        return {"cpu_s": cpu_s, "wall_s": 1.0, "peak_memory_bytes": 8, "yardstick_s": 2.0, "tests": tests}

    found = medians([cost(3.0, a=2.0), cost(1.0, a=0.5), cost(2.0, a=1.5)])
    assert found["cpu_s"] == 2.0 and found["tests"] == {"a": 1.5}


def test_ratio_is_that_of_the_seconds_and_free_of_the_machines_speed() -> None:
    then = reference()
    slower = {**then, "cpu_s": 3 * then["cpu_s"], "yardstick_s": 2 * then["yardstick_s"]}
    assert against(slower, then) == pytest.approx({"cpu": 3, "cpu_in_yardsticks": 1.5, "peak_memory": 1})
    assert against({**then, "budget": "full"}, then) is None


def test_reference_is_the_default_case_and_adds_up() -> None:
    then = reference()
    assert (then["unlearned"], then["budget"], then["limit"], then["threads"]) == ("demo:npo", "quick", None, 1)
    assert len(then["verdicts"]) >= 3
    for cost in then["verdicts"]:
        assert sum(cost["tests"].values()) == pytest.approx(cost["cpu_s"])


@pytest.mark.slow
def test_a_small_verdict_is_measured() -> None:
    outcome = call_main(main, "--quick", "--json", "-")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["against_reference"] is None, "of 8 facts"
    assert set(record["models"]) == set(record["tests"]) - {REST}
    each = {"base", "unlearned", "control"}
    comparing = {entry.name: entry.compares_models for entry in catalogue.entries(None)}
    assert {comparing[name] for name in record["models"]} == {True, False}
    for name, roles in record["models"].items():
        assert set(roles) == ({ALL_MODELS} if comparing[name] else each), name


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--budget", "huge"], ["--budget must be quick, standard or full, got huge"]),
        (["--unlearned", "demo:nope"], ["--unlearned must be one of", "demo:npo", "got demo:nope"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call_main(main, *arguments), *phrases)
