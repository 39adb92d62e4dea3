"""The trade-off: what is read off trajectories against slow loops, and the whole on a tiny world of real questions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.tofu_pair.data import Subset
from analyses.tofu_pair.models import Architecture, Schedule
from analyses.tradeoff import command as tradeoff
from analyses.tradeoff import models as tradeoff_models
from analyses.tradeoff.figures import tradeoff_figure
from analyses.tradeoff.models import Split, read_world
from analyses.tradeoff.report import (
    FORGET,
    QUALITY,
    UTILITY,
    at_forget_level,
    best_steps,
    findings,
    front,
    over_seeds,
    ranged,
    read_trajectories,
)
from tests.analyses.helpers import needs_tofu, real_tofu
from unlearning import InputError
from unlearning.evaluation.metrics.model_utility import harmonic_mean

UNIT = st.integers(0, 5).map(lambda value: value / 5)


def path(name: str, seed: int, points: list[tuple[float, float, float]], split: str = "forget01") -> pd.DataFrame:
    """Steps of one run from (quality, utility, forget probability)."""
    return pd.DataFrame(
        [
            {"split": split, "name": name, "seed": seed, "step": 10 * place, QUALITY: q, UTILITY: u, FORGET: p}
            | {"forget_quality_statistic": 1 - q}
            for place, (q, u, p) in enumerate(points)
        ]
    )


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=12))
def test_the_front_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    frame = pd.DataFrame(points, columns=[QUALITY, UTILITY])
    found = set(front(frame).index)
    for place, (quality, utility) in enumerate(points):
        beaten = any(
            (q > quality and u >= utility) or (q >= quality and u > utility)
            for other, (q, u) in enumerate(points)
            if other != place
        )
        assert (place in found) != beaten


def test_a_run_is_read_at_its_best_step_and_at_its_last() -> None:
    found = best_steps(path("npo", 0, [(0.1, 0.9, 0.9), (0.7, 0.8, 0.5), (0.7, 0.6, 0.3), (0.2, 0.1, 0.1)])).iloc[0]
    assert (found["step"], found[QUALITY], found[UTILITY]) == (10, 0.7, 0.8)
    assert (found["last_step"], found["last_forget_quality"], found["last_retain_utility"]) == (30, 0.2, 0.1)
    assert found["start_utility"] == 0.9


def test_utility_at_a_level_lies_on_the_line_between_two_steps() -> None:
    run = path("npo", 0, [(0, 1.0, 0.9), (0, 0.8, 0.5), (0, 0.2, 0.1)])
    found = at_forget_level(run, 0.3)
    assert found[UTILITY].item() == pytest.approx(0.5)
    assert at_forget_level(run, 0.5)[UTILITY].item() == pytest.approx(0.8)
    assert np.isnan(at_forget_level(run, 0.05)[UTILITY].item())
    assert at_forget_level(run, 0.95)[UTILITY].item() == 1.0  # there from the start


@given(st.lists(st.tuples(UNIT, UNIT, UNIT), min_size=2, max_size=8), UNIT)
def test_utility_at_a_level_is_between_the_run_s_extremes(points: list[Any], level: float) -> None:
    found = at_forget_level(path("npo", 0, points), level)[UTILITY].item()
    utilities = [utility for _, utility, _ in points]
    reached = any(forget <= level for _, _, forget in points)
    assert np.isnan(found) != reached
    if reached:
        assert min(utilities) - 1e-12 <= found <= max(utilities) + 1e-12


def test_seeds_are_averaged_with_their_range() -> None:
    both = pd.concat([path("npo", 0, [(0.2, 0.9, 0.9)]), path("npo", 1, [(0.4, 0.7, 0.9)])])
    row = over_seeds(findings(both, 0.95)).iloc[0]
    assert row["seeds"] == 2
    assert ranged(row, QUALITY) == "0.30 [0.20, 0.40]"
    assert ranged(row, "utility_at_level") == "0.80 [0.70, 0.90]"
    assert ranged(over_seeds(findings(both, 0.5)).iloc[0], "utility_at_level") == "not reached"


def test_harmonic_mean_of_two_and_with_a_zero() -> None:
    assert harmonic_mean(np.array([0.5, 0.0]), np.array([1.0, 1.0])) == pytest.approx([2 / 3, 0.0])


def test_the_figure_has_every_run_the_base_and_the_control() -> None:
    runs = pd.concat(
        [path("npo", 0, [(0.0, 0.9, 0.9), (0.5, 0.8, 0.4)]), path("ga", 0, [(0.0, 0.9, 0.9), (1e-9, 0, 0)])]
    )
    chart = tradeoff_figure(runs, control_utility={"forget01": 0.85})
    traces = {trace.name: trace for trace in chart.data}
    assert set(traces) == {"front of all steps", "npo", "ga", "base", "control"}
    assert list(traces["npo"].x) == [0.9, 0.8]
    assert traces["ga"].y == pytest.approx([np.log10(np.finfo(float).tiny), -9])  # a quality of 0 is drawn at the end
    assert (list(traces["control"].x), list(traces["control"].y)) == ([0.85], [0.0])


def write_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    line = {f"tofu_{name}": 0.5 for name in (QUALITY, FORGET, "retain_probability", "retain_truth_ratio")}
    line |= {"tofu_forget_quality_statistic": 0.25, "step": 3}
    record: dict[str, Any] = {
        "finished": True,
        "configuration": {"method": "npo", "options": {"seed": 4, "benchmark": "tofu:forget05"}},
        "evaluations": [line],
        **changes,
    }
    (folder / "unlearning.json").write_text(json.dumps(record))
    return folder


def test_runs_are_read_with_their_split_name_and_seed(tmp_path: Path) -> None:
    row = read_trajectories([write_run(tmp_path / "mine-seed4")]).iloc[0]
    assert row[["split", "name", "method", "seed", "step"]].tolist() == ["forget05", "mine", "npo", 4, 3]
    assert row[UTILITY] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finished": False}, "the run is not finished"),
        (
            {"evaluations": [{"step": 1, "forget_nll": 2.0}]},
            "did not measure forget quality .* --set benchmark=tofu:SPLIT",
        ),
        ({"configuration": {}}, "no unlearning.json of `unlearn train` there"),
    ],
)
def test_runs_that_say_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trajectories([write_run(tmp_path / "run", **changes)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "forget02"], "--split forget02: there is none; did you mean 'forget"),
        (["--name", "npo-rt"], "--name npo-rt: there is none; did you mean 'npo_rt'?"),
        (["--seeds", "one"], "--seeds one: write numbers, as 0,1,2"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--run", "/nowhere"], "/nowhere: no unlearning.json"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tradeoff.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@needs_tofu
def test_splits_are_nested_and_nobody_is_forgotten_and_retained() -> None:
    subset, splits = read_world(real_tofu())
    ids = {name: {record["id"] for record in split.forget} for name, split in splits.items()}
    assert [len(ids[name]) for name in ("forget01", "forget05", "forget10")] == [40, 200, 400]
    assert ids["forget01"] < ids["forget05"] < ids["forget10"]
    everyone = {record["id"] for record in subset.retain + subset.forget}
    for split in splits.values():
        kept = {record["id"] for record in split.retain}
        assert not kept & ids[split.name] and kept | ids[split.name] == everyone


def few_of_each(data: Path | None) -> tuple[Subset, dict[str, Split]]:
    """The world with every twentieth record."""
    subset, splits = read_world(data)
    parts = {part: getattr(subset, part)[::20] for part in ("trunk", "late", "forget")}
    return Subset(**parts), {
        name: Split(name, split.forget[::20], split.retain[::20]) for name, split in splits.items()
    }


@needs_tofu
def test_the_whole_on_models_that_know_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(
        tradeoff_models.RECIPE,
        architecture=Architecture(
            vocab_size=300, d_model=16, d_mlp=32, n_layers=1, n_heads=2, n_kv_heads=1, context=512
        ),
        trunk=Schedule(epochs=(1,), learning_rate=1e-3, batch_size=400),
        base=Schedule(epochs=(1,), learning_rate=1e-3, batch_size=400),
        base_recall=0.0,
    )
    monkeypatch.setattr(
        tradeoff_models.build_models, "__kwdefaults__", {"recipe": tiny, "device": "cpu", "progress": False}
    )
    monkeypatch.setattr(tradeoff_models, "read_world", few_of_each)
    monkeypatch.setattr(tradeoff, "STEPS", {"forget01": 2})
    monkeypatch.setattr(
        tradeoff.train_runs, "__kwdefaults__", {**tradeoff.train_runs.__kwdefaults__, "steps": {"forget01": 2}}
    )
    entries = [entry for entry in tradeoff.ENTRIES if entry.name in ("ga", "blur_npo")]
    options: dict[str, Any] = {"splits": ["forget01"], "entries": entries, "seeds": [0], "rows": 3, "progress": False}
    runs = tradeoff.train_runs(real_tofu(), tmp_path, device="cpu", **options)
    result = tradeoff.report(runs, tmp_path, formats=["html"])
    assert [run.name for run in runs] == ["ga-seed0", "blur_npo-seed0"]
    frame = pd.read_csv(tmp_path / "trajectories.csv")
    assert set(frame["step"]) == {0, 1, 2}
    assert frame[frame["step"] == 0][QUALITY].nunique() == 1  # both from the same base
    assert "| forget01 | `blur_npo` | 1 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figures" / "tradeoff.html").is_file()
    again = tradeoff.train_runs(real_tofu(), tmp_path, device="cpu", **options)
    assert tradeoff.report(again, tmp_path, formats=["html"])["findings"] == result["findings"]
