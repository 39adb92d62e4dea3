"""Scalability and sustainability on invented data: from which model, on what, gone on with, told."""

import gc
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses.muse_runs.command import Request, Study, command_line, main, run
from analyses.muse_runs.report import SHOWN, figure
from tests.command_lines import call_main
from tests.unlearning.evaluation.benchmarks.muse.muse_world import build_long_llama, muse_parts, write_hub
from tests.unlearning.helpers import build_tokenizer
from unlearning.cli import main as unlearn
from unlearning.common.errors import InputError
from unlearning.data import hub
from unlearning.evaluation.subject import open_subject


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """As in tests/unlearning: each training ends with a collection, which took half of its time."""
    import transformers.trainer  # noqa: F401

    import unlearning.training.train  # noqa: F401

    gc.freeze()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def no_download(repository: str, _patterns: Any) -> Path:
        raise InputError(f"{repository}: the hub cannot be reached")

    monkeypatch.setattr(hub, "download", no_download)
    monkeypatch.delenv("DISSECT_DATA", raising=False)
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("unlearning.evaluation.benchmarks.muse.benchmark.CONTINUATION_TOKENS", 8)  # for speed


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("muse")
    write_hub(root / "data" / "muse-news", muse_parts())
    for name, seed in (("start", 0), ("never", 3)):
        build_long_llama(seed).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    return Study(
        model=str(root / "start"),
        method="ga",
        options={
            "max_steps": 1,
            "learning_rate": 1e-2,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "eval_examples": 1,
            "eval_every": 9,
        },
        data=root / "data",
        control=str(root / "never"),
        limit=1,
    )


@pytest.fixture(scope="module")
def done(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("unlearning.evaluation.benchmarks.muse.benchmark.CONTINUATION_TOKENS", 8)
        out = tmp_path_factory.mktemp("out") / "run"
        return out, run(replace(study, limit=2), out, progress=False)


def record(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "models" / name / "unlearning.json").read_text())
    return found


def test_scal_starts_anew_and_sust_goes_on(study: Study, done: tuple[Path, pd.DataFrame]) -> None:
    out, frame = done
    start = open_subject(study.model).sha256
    for number in range(1, 5):
        assert record(out, f"scal-{number}")["configuration"]["start_weights"] == start
        before = start if number == 1 else open_subject(out / "models" / f"sust-{number - 1}").sha256
        assert record(out, f"sust-{number}")["configuration"]["start_weights"] == before
    counts = frame.drop_duplicates(["kind", "number"]).set_index(["kind", "number"])
    assert counts.loc["scal", "documents"].tolist() == [2, 4, 6, 8]
    assert counts.loc["scal", "repeated"].tolist() == [0, 2, 4, 6]  # nested
    assert counts.loc["sust", "documents"].tolist() == [2, 2, 2, 2]
    assert counts.loc["sust", "repeated"].tolist() == [0, 0, 0, 0]  # disjoint


def test_every_model_is_evaluated_as_the_command_does(study: Study, done: tuple[Path, pd.DataFrame]) -> None:
    out, frame = done
    assert len(frame[frame["metric"] == "retain_knowmem"]) == 1 + 4 + 4 + 1  # start, both kinds, the retain model
    told = call_main(
        unlearn, "eval", "muse", "--corpus", "news", "--model", out / "models" / "sust-3", "--quiet", "--json",
        "--data-dir", study.data or "", "--control", study.control or "", "--limit", "2", "--out", out / "again",
    )  # fmt: skip
    assert told.code == 0, told.err
    expected = json.loads(told.out)["metrics"]
    mine = frame[(frame["kind"] == "sust") & (frame["number"] == 3)].set_index("metric")
    assert set(mine.index) == set(expected)
    for name, metric in expected.items():
        assert mine.loc[name, "value"] == pytest.approx(metric["value"]), name
        assert mine.loc[name, "low"] == pytest.approx(metric["low"]), name
        theirs = frame[(frame["kind"] == "retain") & (frame["metric"] == name)]["value"].tolist()
        assert theirs == ([metric["control"]] if "control" in metric else []), name


def test_it_goes_on_where_it_stopped_and_refuses_another_study(
    study: Study, done: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, frame = done
    out = shutil.copytree(original, tmp_path / "copy")

    def not_called(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("unlearning.evaluation.benchmarks.muse.benchmark.greedy_answers", not_called)
    monkeypatch.setattr("unlearning.training.train.run_steps", not_called)
    without = replace(study, limit=2, control=None, auc_retain=0.4772)  # which no row depends on
    again = run(without, out, progress=False)
    keys = ["kind", "number", "metric"]
    both = frame.merge(again, on=keys, suffixes=("", "_again"))
    both = both[both["metric"] != "privleak"]
    assert len(both) == 9 * 4 and both["value"].tolist() == both["value_again"].tolist()
    leak, area = (again[again["metric"] == name]["value"].to_numpy() for name in ("privleak", "privleak_auc"))
    assert leak == pytest.approx(100 * (area - 0.4772) / 0.4772)
    with pytest.raises(InputError, match="another configuration"):
        run(replace(without, options={**study.options, "max_steps": 2}), out, progress=False)


def test_table_and_figure_show_every_run(done: tuple[Path, pd.DataFrame]) -> None:
    out, frame = done
    lines = (out / "table.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:]
    assert names == ["start", "retain", *(f"{kind}-{number}" for kind in ("scal", "sust") for number in range(1, 5))]
    command = next(line for line in lines if "models/sust-2" in line and "unlearn train" in line)
    assert f"--model {out}/models/sust-1 --forget muse-news:sust:forget_2" in command
    chart = figure(frame, "title")
    assert [trace.name for trace in chart.data] == list(SHOWN.values()) * 2
    scal = frame[(frame["metric"] == "retain_knowmem") & frame["kind"].isin(["start", "scal"])]
    assert list(chart.data[2].x) == [0, 2, 4, 6, 8] and list(chart.data[2].y) == scal["value"].tolist()
    assert list(chart.data[6].x) == [0, 1, 2, 3, 4]
    assert pd.read_csv(out / "findings.csv")["value"].tolist() == pytest.approx(frame["value"].tolist())


def test_the_command_of_the_table_makes_the_model(
    study: Study, done: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    line = next(line for line in (out / "table.md").read_text().splitlines() if "models/sust-2" in line)
    variable, *words = shlex.split(line)
    monkeypatch.setenv(*variable.split("=", 1))
    told = call_main(unlearn, *words[1:], "--quiet", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["already_done"]
    assert "DISSECT_DATA" not in command_line(replace(study, data=None), Request("scal", 1, "start", 2, 0), out)


def test_command_line_writes_everything(study: Study, done: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    out = shutil.copytree(done[0], tmp_path / "copy", ignore=shutil.ignore_patterns("eval", "findings.csv"))
    settings = [word for option, value in study.options.items() for word in ("--set", f"{option}={value}")]
    told = call_main(
        main, "--model", study.model, "--method", "ga", "--data", study.data or "", "--kind", "sust", "--limit", "1",
        *settings, "--out", out, "--json", "--quiet",
    )  # fmt: skip
    assert told.code == 0, told.err
    findings = json.loads(told.out)["findings"]
    assert {row["run"] for row in findings} == {"start", *(f"sust-{number}" for number in range(1, 5))}
    assert {row["low"] for row in findings} == {None}  # one row has no interval
    assert (out / "figures" / "muse_runs.html").stat().st_size > 10_000


def test_bad_input_ends_with_one_line(study: Study, tmp_path: Path) -> None:
    command = ["--model", study.model, "--method", "ga", "--out", tmp_path / "out"]
    here = [*command, "--data", study.data or ""]
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Any], str]] = [
        (command[:2], "--method"),
        ([*here, "--kind", "scale"], "--kind scale: there are scal, sust"),
        ([*here, "--set", "epochs"], "--set KEY=VALUE"),
        ([*here, "--format", "jpg"], "--format must be"),
        ([*here, "--auc-retain", "0.5", "--control", "a"], "give one of them"),
        ([*here, "--retain", "muse-news:raw:retain9"], "no split 'retain9'"),
        ([*command, "--data", tmp_path / "empty"], "muse-news:scal:forget_1: "),
    ]
    for arguments, message in cases:
        told = call_main(main, *arguments)
        assert told.code == 2 and message in told.err, (arguments, told.err)
        assert len(told.err.strip().splitlines()) == 1, told.err
    assert not (tmp_path / "out").exists()
