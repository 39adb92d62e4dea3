"""`dissect patch`: what it says, where it writes, and that it goes on where it stopped."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from dissect import zoo
from dissect.sweeps.tables import interval as _interval
from tests.dissect.cli.helpers import Outcome, World, build_records, call, write_records


def test_json_is_the_only_thing_on_stdout_and_agrees_with_the_files(
    world: World, finished: tuple[Path, Outcome]
) -> None:
    run, outcome = finished
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told.pop("run") == str(run)
    assert [Path(path) for path in told.pop("figures")] == [
        run / "figures" / name for name in ("krs.html", "difference.html", "examples.html", "krs.csv", "difference.csv")
    ]
    assert told == json.loads((run / "summary.json").read_text())
    assert told["base"] == str(world.base)
    assert told["control"] == str(world.control)
    assert told["examples"] == 6


def test_json_peaks_are_the_table_s_own(finished: tuple[Path, Outcome]) -> None:
    run, outcome = finished
    frame = pd.read_parquet(run / "results.parquet")
    means = frame.groupby(["target", "site", "centre"])["krs"].mean()
    peaks = json.loads(outcome.out)["peaks"]
    assert [peak["site"] for peak in peaks] == ["mlp_coef", "attn_out", "mlp_coef+attn_out"]
    for peak in peaks:
        ours, control = means["unlearned", peak["site"]], means["control", peak["site"]]
        assert peak["centre"] == ours.idxmax()
        assert peak["krs"] == pytest.approx(ours.max(), abs=1e-12)
        assert peak["control_krs"] == pytest.approx(control[peak["centre"]], abs=1e-12)
        assert peak["difference"] == pytest.approx(ours.max() - control[peak["centre"]], abs=1e-12)
        assert peak["difference_low"] <= peak["difference"] <= peak["difference_high"]


def test_quiet_says_nothing(world: World, tmp_path: Path) -> None:
    assert call(*world.patch(tmp_path / "run", "--quiet")) == Outcome(0, "", "")
    assert (tmp_path / "run" / "figures" / "krs.html").is_file()


def test_quiet_json_is_still_json(world: World, tmp_path: Path) -> None:
    outcome = call(*world.patch(tmp_path / "run", "--quiet", "--json"))
    assert json.loads(outcome.out)["configuration"]["windows"] == ["1"]
    assert outcome.err == ""


def test_table_names_the_sites_the_figure_and_the_missing_control(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = call(*world.patch(tmp_path / "run"))
    assert (outcome.code, outcome.err) == (0, "")
    assert "mlp_coef" in outcome.out
    assert "No control" in outcome.out
    assert f"figure  {tmp_path / 'run' / 'figures' / 'krs.html'}\n" in outcome.out
    assert f"run     {tmp_path / 'run'}\n" in outcome.out


def test_table_cuts_no_site_short_in_a_narrow_terminal(
    finished: tuple[Path, Outcome], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sites = "mlp_coef,attn_out,mlp_coef+attn_out"
    arguments = ["--control", str(world.control), "--window", "3", "--sites", sites, "--seed", "7"]
    outcome = call(*world.patch(finished[0], *arguments))
    assert outcome.code == 0
    assert "mlp_coef+attn_out" in outcome.out
    assert "…" not in outcome.out


def test_table_puts_the_control_beside_the_score(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = call(*world.patch(tmp_path / "run", "--control", str(world.control)))
    assert (outcome.code, outcome.err) == (0, "")
    assert "control" in outcome.out and "difference" in outcome.out
    assert "No control" not in outcome.out
    peak = json.loads((tmp_path / "run" / "summary.json").read_text())["peaks"][0]
    for name in ("krs", "control_krs", "difference"):
        low, high = (f"{peak[f'{name}_{end}']:.2f}".replace("0.", ".") for end in ("low", "high"))
        assert f"{peak[name]:.2f} [{low}, {high}]" in outcome.out


def test_interval_drops_only_a_leading_zero() -> None:
    row = {"krs": -0.5, "krs_low": -10.25, "krs_high": 0.05}
    assert _interval(row, "krs") == "-0.50 [-10.25, .05]"


@pytest.mark.parametrize(
    ("extra", "name"), [([], "patch-unlearned-window1"), (["--window", "3"], "patch-unlearned-window3")]
)
def test_default_directory_is_named_after_the_model_and_the_window(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*world.patch(None, "--quiet", *extra)).code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]


def test_show_prompts_marks_the_answer_and_computes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    outcome = call(*world.patch(tmp_path / "run", "--show-prompts", "2"))
    assert (outcome.code, outcome.err) == (0, "")
    assert not (tmp_path / "run").exists()
    blocks = [block for block in outcome.out.split("\n\n") if block.strip()]
    assert len(blocks) == 2
    for block, record in zip(blocks, build_records(), strict=False):
        assert f"[{record['id']}] {record['group']}\n" in block
        shown = block[: block.rindex("|\n")]
        prompt, *tokens = shown.partition("\n")[2].split("|")
        assert prompt == f"Question: {record['question']}\nAnswer:"
        assert "".join(tokens) == f" {record['answer']}"
        assert f"{len(tokens)} answer tokens" in block


def test_limit_uses_the_first_prompts_only(world: World, tmp_path: Path) -> None:
    limited = call(*world.patch(tmp_path / "a", "--quiet", "--limit", "4"))
    fewer = write_records(tmp_path / "fewer.jsonl", build_records(4))
    assert limited == call(*world.patch(tmp_path / "b", "--quiet", data=fewer))
    assert_frame_equal(
        pd.read_parquet(tmp_path / "a" / "results.parquet"), pd.read_parquet(tmp_path / "b" / "results.parquet")
    )


def test_models_without_a_difference_give_null_and_one_line_that_says_why(world: World, tmp_path: Path) -> None:
    outcome = call(*world.patch(tmp_path / "run", "--json", unlearned=world.base))
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("dissect: 6 examples have no KRS in the main arm: ")
    told = json.loads(outcome.out, parse_constant=_not_json)
    assert [place["krs"] for place in told["curve"]] == [None, None, None]
    assert told["peaks"] == []
    frame = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert frame["krs"].map(math.isnan).all()
    assert (frame["loss_unlearned"] == 0).all()


def _not_json(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_finished_run_is_read_back_instead_of_computed_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call(*world.patch(tmp_path / "run", "--json"))
    written = (tmp_path / "run" / "results.parquet").stat().st_mtime_ns

    def never(*_arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("dissect.engine.reference.sweep", never)
    again = call(*world.patch(tmp_path / "run", "--json"))
    assert (again.code, again.out) == (first.code, first.out)
    assert "nothing was computed again" in again.err
    assert (tmp_path / "run" / "results.parquet").stat().st_mtime_ns == written


@pytest.mark.skipif(
    not (zoo.BUILTIN["demo:base"] / "config.json").is_file(),
    reason="the built-in models are not built yet: python -m dissect.zoo.build",
)
def test_builtin_pair_runs_on_its_own_questions_with_its_own_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(
        *["patch", "--base", "demo:base", "--unlearned", "demo:npo", "--limit", "3", "--sites", "mlp_coef", "--json"]
    )
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told["run"] == "runs/patch-demo-npo"
    assert told["control"] == "demo:never"
    assert told["data"] == str(zoo.default_prompts("demo"))
    assert {row["target"] for row in told["curve"]} == {"unlearned", "control"}
    assert told["configuration"]["windows"] == ["5", "1", "suffix"]
    assert [peak["window"] for peak in told["peaks"]] == ["5", "1", "suffix"]
