"""`dissect behave`: what it says, where it writes, what it refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dissect import zoo
from dissect.behaviour import run as behaviour
from tests.dissect.cli.helpers import Outcome, World, assert_refused, build_records, call, write_records

OTHERS = [
    {"question": "Where is Oslo?", "answer": "by the sea", "id": "o0"},
    {"question": "Who is Hal?", "answer": "Finn", "id": "o1"},
]


BUILT = pytest.mark.skipif(
    not (zoo.BUILTIN["demo:base"] / "config.json").is_file(),
    reason="the built-in models are not built yet: python -m dissect.zoo.build",
)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "others.jsonl", OTHERS)


def arguments(world: World, others: Path | None, out: Path | None, *more: str | Path, **other: Path) -> list[str]:
    paths = {"base": world.base, "unlearned": world.unlearned, "data": world.data, **other}
    named = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    named += [] if others is None else ["--retain", str(others)]
    named += [] if out is None else ["--out", str(out)]
    return ["behave", *named, "--max-new-tokens", "4", *map(str, more)]


@pytest.fixture(scope="module")
def finished(world: World, others: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The directory of a finished run with a control, and what `--json` said of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, call(*arguments(world, others, out, "--control", world.control, "--json"))


def test_json_is_the_only_thing_on_stdout_and_agrees_with_the_files(
    world: World, finished: tuple[Path, Outcome]
) -> None:
    run, outcome = finished
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told.pop("run") == str(run)
    written = ("behaviour.html", "coefficients.html", "behaviour.csv", "coefficients.csv")
    assert [Path(path) for path in told.pop("figures")] == [run / "figures" / name for name in written]
    assert told == json.loads((run / "summary.json").read_text())
    assert told["control"] == str(world.control)
    frame = pd.read_parquet(run / "results.parquet")
    kl = frame[(frame["target"] == "control") & (frame["set"] == "retain")]["kl"].mean()
    (mean,) = [row for row in told["means"] if (row["set"], row["model"], row["metric"]) == ("retain", "control", "kl")]
    assert mean["value"] == pytest.approx(kl, abs=1e-12)
    assert mean["n"] == len(OTHERS)


def test_table_has_every_score_set_and_the_selectivity(
    world: World, others: Path, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run, _ = finished
    outcome = call(*arguments(world, others, run, "--control", world.control))
    assert outcome.code == 0
    assert "nothing was computed again" in outcome.err
    for word in ("BLEU", "ROUGE-L", "KL, nats", "exact match", "probability", "perplexity", "forget", "retain"):
        assert word in outcome.out
    assert "…" not in outcome.out
    (told, _) = json.loads((run / "summary.json").read_text())["selectivity_last_layer"]
    assert f"moved {told['selectivity']:.2f} [" in outcome.out
    assert "No control" not in outcome.out
    assert outcome.out.endswith(f"figure  {run / 'figures' / 'behaviour.html'}\nrun     {run}\n")


def test_finished_run_is_not_computed_again(
    world: World, others: Path, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first = finished
    monkeypatch.setattr(behaviour, "example_rows", None)
    again = call(*arguments(world, others, run, "--control", world.control, "--json", "--quiet"))
    assert again == first


def test_quiet_says_nothing_and_a_missing_control_is_said_otherwise(world: World, others: Path, tmp_path: Path) -> None:
    assert call(*arguments(world, others, tmp_path / "run", "--quiet")) == Outcome(0, "", "")
    assert (tmp_path / "run" / "figures" / "behaviour.html").is_file()
    assert "No control" in call(*arguments(world, others, tmp_path / "run")).out


def test_default_directory_is_named_after_the_model(
    world: World, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments(world, others, None, "--quiet", "--limit", "1")).code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["behave-unlearned"]


@BUILT
def test_concept_file_needs_nothing_else(tmp_path: Path) -> None:
    concept = {
        "id": 0,
        "Concept": "Noutuk Howai",
        "QA": [" Where was Noutuk Howai born?"],
        "unrelated_QA": [" Where was Heipril Defas born?", " Which firm does Heipril Defas work for?\n"],
        "text_completion": [{"First_half": "Noutuk Howai was born in", "Second_half": "Wutam"}],
    }
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps([concept]))
    models = ["--base", "demo:base", "--unlearned", "demo:npo"]
    outcome = call("behave", *models, "--data", path, "--answers", "base", "--out", tmp_path / "run", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told["configuration"]["sets"] == ["forget", "retain", "completion"]
    assert told["configuration"]["examples"] == [1, 2, 1]
    assert told["configuration"]["true_answers"] == []


def test_some_shared_prompts_are_left_out_in_one_line(world: World, tmp_path: Path) -> None:
    mixed = write_records(tmp_path / "mixed.jsonl", [*OTHERS, build_records()[0]])
    outcome = call(*arguments(world, mixed, tmp_path / "run", "--quiet"))
    assert outcome.code == 0
    assert outcome.err.startswith("dissect: warning: 1 of the 3 retain prompts")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (["--format", "gif"], ["--format must be", "gif"]),
        (["--answers", "guessed"], ["--answers", "guessed", "given or base"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--limit", "0"], ["--limit must be at least 1"]),
        (["--template", "Q: {q}"], ["--template", "{question}"]),
        (["--control", "/no/where"], ["/no/where", "no such directory"]),
        (["--completions", "/no/where.json"], ["/no/where.json", "no such file"]),
        (["--retain", "/no/where.json"], ["/no/where.json", "no such file"]),
        (["--retain", "same"], ["must", "all 6"]),
        (["--retain", "empty"], ["record 1: the answer is empty"]),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    world: World, others: Path, tmp_path: Path, more: list[str], phrases: list[str]
) -> None:
    files = {
        "same": str(world.data),
        "empty": str(write_records(tmp_path / "empty.jsonl", [{"question": "Who?", "answer": " "}])),
    }
    outcome = call(*arguments(world, others, tmp_path / "run", *(files.get(word, word) for word in more)))
    assert_refused(outcome, *phrases)
    assert not (tmp_path / "run").exists()


def test_retain_prompts_are_needed_where_no_file_brings_them(world: World, tmp_path: Path) -> None:
    assert_refused(call(*arguments(world, None, tmp_path / "run")), "--retain is missing")


def test_launch_of_several_processes_is_refused(
    world: World, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert_refused(call(*arguments(world, others, tmp_path / "run")), "one process", "torchrun")


@BUILT
def test_builtin_pair_takes_its_own_questions_and_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("behave", "--base", "demo:base", "--unlearned", "demo:npo", "--limit", "6", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told["run"] == "runs/behave-demo-npo"
    assert told["control"] == "demo:never"
    assert told["data"] == {
        "forget": str(zoo.question_set("forget")),
        "retain": str(zoo.question_set("retain")),
    }
    means = {(row["set"], row["model"], row["metric"]): row["value"] for row in told["means"]}
    assert means["forget", "base", "exact_match"] == means["retain", "unlearned", "exact_match"] == 1
    assert means["forget", "unlearned", "exact_match"] < 0.5
