"""`dissect probe`: what it says, where it writes, what it refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dissect import load_probe, zoo
from tests.command_lines import call_main
from tests.dissect.cli.helpers import Outcome, World, assert_refused, build_records, call, write_records
from unlearning.cli import main as unlearn

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
    return ["probe", *named, "--last-layers", "2", "--draws", "2", *map(str, more)]


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
    written = [f"{name}.{kind}" for kind in ("html", "csv") for name in ("neurons", "layers", "scaling")]
    assert [Path(path) for path in told.pop("figures")] == [run / "figures" / name for name in written]
    assert told == json.loads((run / "summary.json").read_text())
    assert told["control"] == str(world.control)
    frame = pd.read_parquet(run / "results.parquet")
    krs = frame[(frame["target"] == "control") & (frame["selection"] == "top") & (frame["k"] == 16)]["krs"].mean()
    (row,) = [row for row in told["restored"] if (row["target"], row["selection"], row["k"]) == ("control", "top", 16)]
    assert row["krs"] == pytest.approx(krs, abs=1e-12)
    assert row["n"] == 6
    assert len(told["neurons"]) == 20
    assert len(told["last_layers_share"]) == 2 * 2 * 3


def test_tables_name_every_part(
    world: World, others: Path, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run, _ = finished
    outcome = call(*arguments(world, others, run, "--control", world.control))
    assert outcome.code == 0
    assert "nothing was computed again" in outcome.err
    for words in (
        "change of the MLP coefficients",
        "selectivity",
        "neurons that changed most",
        "KRS when the base's coefficients of k neurons are restored",
        "norm-matched",
        "all 72",
        "coefficients of layers 1-2 scaled towards the base's",
        "the unlearned model: restoring all coefficients gives KRS",
        "the control: restoring all coefficients gives KRS",
    ):
        assert words in outcome.out
    assert "No control" not in outcome.out
    half = load_probe(run).half().iloc[0]
    assert f"{half['k_half']:.0f} most changed ones ({half['share']:.1%})" in outcome.out
    assert outcome.out.endswith(f"run     {run}\n")


def test_without_control_and_retain_prompts_it_says_what_is_missing(world: World, tmp_path: Path) -> None:
    outcome = call(*arguments(world, None, tmp_path / "run", "--control", "none", "--limit", "2"))
    assert outcome.code == 0, outcome.err
    assert "No control" in outcome.out
    assert "damage, retain" not in outcome.out
    assert "selectivity  " not in outcome.out


def test_identical_models_are_told_and_not_scored(world: World, others: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = call(*arguments(world, others, out, "--control", "none", unlearned=world.base))
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "dissect: 6 forget examples have no KRS in unlearned: base and target give the same logits: nothing to recover",
        "dissect: 2 retain examples have no KRS in unlearned: base and target give the same logits: nothing to recover",
    ]
    assert "base and unlearned have the same coefficients" in outcome.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["neurons"] == []
    assert all(row["krs"] is None for row in summary["restored"])


def test_concept_vectors_of_the_data_are_compared(world: World, others: Path, tmp_path: Path) -> None:
    record = {
        "Concept": "Oslo",
        "Layer": 1,
        "Dim": 7,
        "QA": [" Where was Ada born?\n", " Who is Ben?\n"],
        "QA_with_answers": [
            "Question:  Where was Ada born?\n\n Answer: Oslo",
            "Question:  Who is Ben?\n\n Answer: Lima",
        ],
        "answers_tokens_num": [1, 1],
    }
    data = tmp_path / "concepts.json"
    data.write_text(json.dumps([record]))
    outcome = call(*arguments(world, others, tmp_path / "run", "--control", "none", "--json", data=data))
    assert outcome.code == 0, outcome.err
    (concept,) = json.loads(outcome.out)["concepts"]
    assert (concept["concept"], concept["layer"], concept["neuron"]) == ("Oslo", 1, 7)
    assert 0.9 < concept["cosine"] < 1
    evaluated = call_main(
        unlearn,
        *("eval", "conceptvectors", "--base", world.base, "--model", world.unlearned, "--concepts", data),
        *("--max-new-tokens", "1", "--out", tmp_path / "evaluated", "--json"),
    )
    assert evaluated.code == 0, evaluated.err
    metrics = json.loads(evaluated.out)["metrics"]
    shared = ("cosine", "l2", "jaccard_unembed", "jaccard_norm_unembed")
    assert {name: concept[name] for name in shared} == {name: metrics[f"vector_{name}"]["value"] for name in shared}
    assert concept["jaccard_unembed"] != concept["jaccard_norm_unembed"]
    data.write_text(json.dumps([record | {"unrelated_QA": ["born"]}]))  # room for the 30 tokens that are its answer
    short = ["--template", "{question}", "--control", "none", "--json"]
    own = call(*arguments(world, None, tmp_path / "own", *short, data=data))
    assert own.code == 0, own.err
    assert json.loads(own.out)["data"]["retain"].endswith("(unrelated_QA)")
    data.write_text(json.dumps([record | {"Layer": 19}]))
    assert_refused(
        call(*arguments(world, others, tmp_path / "far", data=data)), "layer 19", "has layers 0 to 2", "--no-concepts"
    )
    left_out = call(
        *arguments(world, others, tmp_path / "far", "--no-concepts", "--control", "none", "--json", data=data)
    )
    assert json.loads(left_out.out)["concepts"] == []


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (("--last-layers", "4"), ("--last-layers", "3", "4")),
        (("--top", "73"), ("--top", "72", "73")),
        (("--draws", "0"), ("--draws", "0")),
        (
            ("--format", "gif"),
            (
                "--format must be",
                "gif",
            ),
        ),
        (("--answers", "mine"), ("--answers", "mine")),
    ],
)
def test_bad_options_are_refused(
    more: tuple[str, ...], phrases: tuple[str, ...], world: World, others: Path, tmp_path: Path
) -> None:
    assert_refused(call(*arguments(world, others, tmp_path / "run", *more)), *phrases)
    assert not (tmp_path / "run").exists()


def test_unrelated_prompts_that_are_the_forget_prompts_are_refused(world: World, tmp_path: Path) -> None:
    assert_refused(call(*arguments(world, world.data, tmp_path / "run")), "--retain must", "give questions")


def test_missing_file_of_retain_prompts_is_told_first(world: World, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.json"
    assert_refused(call(*arguments(world, nowhere, tmp_path / "run", base=tmp_path)), "nowhere.json: no such file")


def test_another_configuration_is_refused(world: World, others: Path, finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    told = call(*arguments(world, others, run, "--control", world.control, "--seed", "3"))
    assert_refused(told, "holds another run", "its seed is 0, not 3")


def test_unfinished_run_goes_on(world: World, tmp_path: Path) -> None:
    """What one run left is not computed again: a smaller set's parts would not fit a larger one."""
    out = tmp_path / "run"
    data = write_records(tmp_path / "more.jsonl", build_records(4))
    whole = call(*arguments(world, None, out, "--control", "none", "--json", data=data))
    assert whole.code == 0
    record = json.loads((out / "run.json").read_text())
    frame = pd.read_parquet(out / "results.parquet")
    (out / "parts").mkdir()
    part = frame[frame["intervention"] == "neurons"].copy()
    part["krs"] = 7.0  # to be seen again
    part.to_parquet(out / "parts" / "neurons-forget-16-00000.parquet", index=False)
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    told = call(*arguments(world, None, out, "--control", "none", data=data))
    assert "resumed the run in" in told.err
    again = pd.read_parquet(out / "results.parquet")
    assert set(again.loc[again["intervention"] == "neurons", "krs"]) == {7.0}
    before, after = (table[table["intervention"] == "scaling"].reset_index(drop=True) for table in (frame, again))
    pd.testing.assert_frame_equal(before, after)


@BUILT
def test_builtin_pair_needs_no_files(tmp_path: Path) -> None:
    words = ["--base", "demo:base", "--unlearned", "demo:npo", "--limit", "2", "--draws", "1"]
    outcome = call("probe", *words, "--out", tmp_path / "run", "--json")
    told = json.loads(outcome.out)
    assert told["control"] == "demo:never"
    assert told["data"]["retain"].endswith("retain.jsonl")
