"""Questions and controls that allow no verdict get exit 2, one line, and no run directory; those that do, a verdict."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dissect import zoo
from dissect.cli import verdict as command
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry
from dissect.stress.core.finetuning import Recipe
from dissect.stress.relearning import relearn_disjoint
from dissect.stress.without_attack import without_attack
from tests.dissect.cli.helpers import Outcome, assert_refused, call, write_records

PAIR = ("verdict", "--base", "demo:base", "--unlearned", "demo:npo", "--budget", "quick", "--limit", "24")

Records = list[dict[str, Any]]

load = command.open_pair


@pytest.fixture(scope="module")
def pairs() -> dict[str, Any]:
    """The pair, once it is loaded."""
    return {}


@pytest.fixture(autouse=True)
def two_tests(monkeypatch: pytest.MonkeyPatch, pairs: dict[str, Any]) -> None:
    """Only the answers as they are and relearning at one rate; models are loaded once for all tests."""
    one_rate = partial(relearn_disjoint, recipes=[Recipe(0.02)])
    cheap = (
        Entry("without_attack", dict.fromkeys(catalogue.BUDGETS, without_attack)),
        Entry("relearn_disjoint", dict.fromkeys(catalogue.BUDGETS, one_rate)),
    )
    monkeypatch.setattr(catalogue, "entries", lambda *_: cheap)

    def opened(*named: Any, **options: Any) -> Any:
        if not pairs:
            pairs["pair"] = load(*named, **options)
        return pairs["pair"]

    monkeypatch.setattr(command, "open_pair", opened)


def records(name: str = "forget") -> Records:
    return [json.loads(line) for line in zoo.question_set(name).read_text().splitlines()]


def people(n: int) -> Records:
    found = records()
    chosen = list(dict.fromkeys(record["group"] for record in found))[:n]
    return [record for record in found if record["group"] in chosen]


def judged(tmp_path: Path, *more: str, **files: Records) -> Outcome:
    """What the command says of questions in files, by flag."""
    flags = [str(part) for flag, kept in files.items() for part in (f"--{flag}", write_records(tmp_path / flag, kept))]
    return call(*PAIR, *flags, *more, "--out", tmp_path / "run")


def every(**changed: Any) -> Callable[[Records], Records]:
    return lambda found: [record | changed for record in found]


@pytest.mark.parametrize("control", ["demo:never", "none"])
@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        (every(group="all"), ("forget prompts must be of at least two groups", "'all'", "Give prompts of more groups")),
        (every(answer="yes"), ("at least two different answers", "all have one answer 'yes'", "Give prompts with")),
        (lambda found: found[:1], ("at least two different answers", "only one prompt", "Give prompts with")),
        (lambda _: people(1), ("forget prompts must be of at least two groups", "or none of them a group")),
    ],
)
def test_forget_prompts_that_leave_no_distractors_are_refused(
    change: Callable[[Records], Records], phrases: tuple[str, ...], control: str, tmp_path: Path
) -> None:
    assert_refused(judged(tmp_path, "--control", control, data=change(records())), *phrases)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("retain", "phrases"),
    [
        (every(group="all")(records("retain")), ("retain prompts must be of at least two groups",)),
        (every(answer="yes")(records("retain")), ("retain prompts must have at least two different answers",)),
        (records("forget"), ("--retain must hold prompts that are not forget prompts", "give questions about")),
    ],
)
def test_retain_prompts_that_show_no_utility_are_refused(
    retain: Records, phrases: tuple[str, ...], tmp_path: Path
) -> None:
    assert_refused(judged(tmp_path, retain=retain), *phrases)
    assert not (tmp_path / "run").exists()


def test_general_prompts_that_are_forget_prompts_are_refused(tmp_path: Path) -> None:
    outcome = judged(tmp_path, general=records("forget"))
    assert_refused(outcome, "--general must hold prompts that are not forget prompts")


@pytest.mark.parametrize("flag", ["--data", "--retain", "--general", "--paraphrases"])
@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_file_is_refused_before_models_are_loaded(
    flag: str, content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "open_pair", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "empty.json"
    file.write_text(content)
    assert_refused(call(*PAIR, flag, file, "--out", tmp_path / "run"), flag, "empty")


@pytest.mark.parametrize("margin", ["0", "1", "nan", "-0.1"])
def test_a_margin_that_is_no_share_is_refused_before_models_are_loaded(
    margin: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "open_pair", lambda *_, **__: pytest.fail("loaded"))
    outcome = call(*PAIR, "--margin", margin, "--out", tmp_path / "run")
    assert_refused(outcome, "--margin must be above 0 and below 1", "such as 0.1")


@pytest.mark.parametrize("other", ["none", "auto"])
def test_several_controls_must_all_be_models(other: str, tmp_path: Path) -> None:
    outcome = judged(tmp_path, "--control", "demo:never", "--control", other)
    assert_refused(outcome, "--control must name models", f"got demo:never, {other}", "Leave auto and none out")


@pytest.mark.parametrize("before", [(), ("--control", "demo:never")])
def test_a_control_of_another_architecture_is_refused(before: tuple[str, ...], tmp_path: Path) -> None:
    outcome = judged(tmp_path, *before, "--control", "demo-neox:never")
    assert_refused(outcome, "--control: demo:base and demo-neox:never differ in architecture", "same pretrained model")


def test_two_people_are_too_few_for_relearning_but_no_bad_input(tmp_path: Path) -> None:
    """Of a held-out fact and its distractor one is taught and the other is not, so nothing can be compared."""
    outcome = judged(tmp_path, "--json", data=people(2))
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["verdict"] != "erased"
    by_test = {row["test"]: row for row in found["evidence"]}
    assert by_test["relearn_disjoint"]["rho"] is None and "no fact" in by_test["relearn_disjoint"]["reason"]


def test_three_questions_give_no_number_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of each of three people: an interval may reach over everything, and every text still says what is known."""
    one = Entry("without_attack", dict.fromkeys(catalogue.BUDGETS, without_attack))
    monkeypatch.setattr(catalogue, "entries", lambda *_: (one,))
    three = list({record["group"]: record for record in records()}.values())[:3]
    outcome = judged(tmp_path, "--control", "none", data=three)
    assert outcome.code == 0, outcome.err
    assert "nan" not in (outcome.out + outcome.err).lower().split(str(tmp_path))[0]
    assert "verdict: erased" not in outcome.out
