"""`dissect verdict`: what it says, where it writes, what it refuses; with only the two cheapest tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dissect import zoo
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry
from dissect.stress.relearning import relearn_disjoint
from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.without_attack import without_attack
from tests.dissect.cli.helpers import Outcome, assert_refused, call
from tests.dissect.stress.spike_ins.constructed import KNOWN, known_people

PAIR = ("verdict", "--base", "demo:base", "--unlearned", "demo:npo", "--budget", "quick")


def cut_down(patched: pytest.MonkeyPatch) -> None:
    cheap = (
        Entry("without_attack", dict.fromkeys(catalogue.BUDGETS, without_attack)),
        Entry("relearn_disjoint", dict.fromkeys(catalogue.BUDGETS, relearn_disjoint)),
    )
    patched.setattr(catalogue, "entries", lambda *_: cheap)
    patched.setattr("dissect.verdicts.run.SAMPLE", dict.fromkeys(catalogue.BUDGETS, 60))


@pytest.fixture(autouse=True)
def two_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_down(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The directory of a finished run, and what `--json` said of it."""
    out = tmp_path_factory.mktemp("runs") / "npo"
    with pytest.MonkeyPatch.context() as patched:
        cut_down(patched)
        return out, call(*PAIR, "--out", out, "--json")


def test_json_is_the_only_thing_on_stdout_and_agrees_with_the_files(finished: tuple[Path, Outcome]) -> None:
    run, outcome = finished
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told.pop("run") == str(run)
    written = ("evidence.html", "standing.html", "evidence.csv")
    assert [Path(path) for path in told.pop("figures")] == [run / "figures" / name for name in written]
    assert told == json.loads((run / "verdict.json").read_text())
    assert told["verdict"] in ("suppressed", "inconclusive") and told["against"] == "control"
    assert [row["test"] for row in told["evidence"]] == ["without_attack", "relearn_disjoint"]


def test_a_finished_run_is_read_and_told_to_a_reader(finished: tuple[Path, Outcome]) -> None:
    run, outcome = finished
    again = call(*PAIR, "--out", run)
    assert again.code == 0
    assert f"verdict: {json.loads(outcome.out)['verdict']}" in again.out
    assert "relearn_disjoint *" in again.out and f"page    {run / 'verdict.html'}" in again.out
    assert call(*PAIR, "--out", run, "--quiet") == Outcome(0, "", "")


def test_plot_draws_its_figures_again(finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    (run / "figures" / "evidence.html").unlink()
    outcome = call("plot", run)
    assert outcome.code == 0 and str(run / "figures" / "evidence.html") in outcome.out
    assert (run / "figures" / "evidence.html").stat().st_size > 1000


def test_spike_ins_are_added_to_a_finished_run_and_told(
    finished: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "npo"
    shutil.copytree(finished[0], run)
    invented: list[int] = []

    def made(_case: object, *, n: int, **_: object) -> SpikeIns:
        invented.append(n)
        return replace(known_people(KNOWN), settings={"n": n})

    monkeypatch.setattr("dissect.verdicts.spiked.spike_ins", made)
    outcome = call(*PAIR, "--out", run, "--spike-ins", "6")
    assert outcome.code == 0 and f"{run} holds this run already; only its spike-ins were added" in outcome.err
    said = " ".join(outcome.out.split())
    assert "In this model relearn_disjoint brings back" in said and "Percentages tell" in said
    assert (run / "figures" / "spike_ins.html").stat().st_size > 1000
    again = call(*PAIR, "--out", run, "--spike-ins", "6", "--json")
    assert invented == [6] and "nothing was computed again" in again.err
    told = json.loads(again.out)["spike_ins"]
    assert told["n"] == 6 and {row["number"] for row in told["numbers"]} >= {"zero", "ceiling", "user", "power"}
    assert_refused(call(*PAIR, "--out", run, "--spike-ins", "8"), "--spike-ins must be 6 in", "--out")
    (run / "figures" / "spike_ins.html").unlink()
    assert call("plot", run).code == 0 and (run / "figures" / "spike_ins.html").exists()


def test_spike_ins_that_fail_name_the_flag(
    finished: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "npo"
    shutil.copytree(finished[0], run)
    failed = SpikeIns.failed("The spike-ins failed: it learns nothing. Invent fewer people (`spike_ins`)", n=6)
    monkeypatch.setattr("dissect.verdicts.spiked.spike_ins", lambda *_, **__: failed)
    outcome = call(*PAIR, "--out", run, "--spike-ins", "6")
    assert outcome.code == 0 and "Invent fewer people (--spike-ins)" in " ".join(outcome.out.split())
    assert f"verdict: {json.loads(finished[1].out)['verdict']}" in outcome.out


def test_another_configuration_is_refused(finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    before = (run / "verdict.json").read_bytes()
    assert_refused(call(*PAIR, "--out", run, "--seed", "3"), f"{run} holds another run", "its seed is 0, not 3")
    assert (run / "verdict.json").read_bytes() == before


def test_a_plan_loads_no_model_and_counts_groups(tmp_path: Path) -> None:
    data = tmp_path / "forget.json"
    records = [{"prompt": f"{n}?", "answer": str(n), "group": f"person {n % 20}"} for n in range(100)]
    data.write_text(json.dumps(records))
    files = ("verdict", "--base", "nowhere", "--unlearned", "nowhere", "--data", data, "--plan")
    outcome = call(*files, "--control", "one", "--control", "two", "--margin", "0.3", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    first = found["plan"][0]
    assert (first["people"], first["facts"], first["controls"], found["margin"]) == (20, 100, 2, 0.3)
    shown = call(*files)
    assert "20 groups, 100 facts, with 1 control" in " ".join(shown.out.split())
    alone = call(*files, "--control", "none")
    assert "20 groups, 100 facts, without a control" in " ".join(alone.out.split())
    assert_refused(call(*files, "--margin", "2"), "--margin must be above 0 and below 1, got 2")


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (("--seed", "-1"), ("--seed", "-1")),
        (("--batch-size", "0"), ("--batch-size", "0")),
        (("--margin", "1.5"), ("--margin must be above 0 and below 1, got 1.5",)),
        (("--budget", "tiny"), ("--budget", "tiny", "quick", "standard", "full")),
        (
            ("--format", "bmp"),
            (
                "--format must be",
                "bmp",
            ),
        ),
        (("--spike-ins", "3"), ("--spike-ins must be at least 4, got 3",)),
        (("--spike-ins", "7"), ("--spike-ins must be even, got 7", "Give 8")),
        (("--spike-ins", "some"), ("--spike-ins", "integer")),
        (("--unlearned", "demo:base"), ("have the same weights", "same weights")),
        (("--control", "demo:never", "--control", "none"), ("--control must name models",)),
        (("--control", "demo:never", "--control", "demo:never"), ("--control must be different models",)),
        (("--control", "demo:whatever"), ("demo:whatever",)),
        (("--base", "demo:never", "--control", "none"), ("must know the forget facts", "nothing to unlearn")),
        (("--data", "nothing.json"), ("nothing.json",)),
        (("--retain", "nothing.json"), ("nothing.json",)),
    ],
)
def test_bad_input_is_refused_in_one_line(more: tuple[str, ...], phrases: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(call(*PAIR, *more, "--out", tmp_path / "run"), *phrases)


def test_a_control_that_knows_is_refused(tmp_path: Path) -> None:
    knowing = tmp_path / "knowing"
    shutil.copytree(zoo.BUILTIN["demo:base"], knowing)
    outcome = call(*PAIR, "--control", knowing, "--out", tmp_path / "run")
    assert_refused(outcome, "must not know the forget facts", "none")


def test_forget_questions_with_one_answer_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "one.json"
    data.write_text(json.dumps([{"prompt": f"Question: {n}?\nAnswer:", "answer": "yes"} for n in range(4)]))
    outcome = call(*PAIR, "--data", data, "--out", tmp_path / "run")
    assert_refused(outcome, "one answer")


def test_it_does_not_run_in_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(call(*PAIR, "--out", tmp_path / "run"), "runs in one process")
