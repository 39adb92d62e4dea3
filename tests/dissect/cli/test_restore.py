"""`dissect restore`, and what it shares with `dissect patch`: kinds of windows, directions, donors, null models."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.dissect.cli.helpers import LAYERS, World, assert_refused, build_neox, call, save


def restore(world: World, out: Path | None, *more: str) -> list[str]:
    """Arguments of `dissect restore` on this world."""
    paths = {"base": world.base, "unlearned": world.unlearned, "data": world.data}
    place = [] if out is None else ["--out", str(out)]
    return [
        "restore",
        *[text for name, path in paths.items() for text in (f"--{name}", str(path))],
        *place,
        *["--chunk-tokens", "100", *more],
    ]


def told(*arguments: str) -> dict[str, Any]:
    """What a command says with `--json`."""
    outcome = call(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    return dict(json.loads(outcome.out))


def test_value_vectors_are_restored_by_default_in_three_kinds_of_windows(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = told(*restore(world, None))
    assert summary["run"] == "runs/restore-unlearned"  # three layers are too few for the usual width of five
    assert summary["configuration"]["windows"] == ["3", "1", "suffix"]
    assert summary["configuration"]["sites"] == ["value_vectors"]
    assert [(peak["site"], peak["window"]) for peak in summary["peaks"]] == [
        ("value_vectors", kind) for kind in ("3", "1", "suffix")
    ]
    frame = pd.read_parquet(Path(summary["run"]) / "results.parquet")
    assert set(frame["kind"]) == {"restore"}
    places = frame[["window", "centre", "first_layer", "last_layer"]].drop_duplicates().to_numpy().tolist()
    assert places == [
        *[["3", 0, 0, 1], ["3", 1, 0, 2], ["3", 2, 1, 2]],
        *[["1", layer, layer, layer] for layer in range(LAYERS)],
        *[["suffix", layer, layer, LAYERS - 1] for layer in range(LAYERS)],
    ]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--prefix"], [["prefix", last, 0, last] for last in range(LAYERS)]),
        (["--layers", "0,2"], [["layers 0,2", 2, 0, 2]]),
        (["--layers", "0-1", "--window", "1"], [*[["1", n, n, n] for n in range(3)], ["layers 0-1", 1, 0, 1]]),
    ],
)
def test_windows_are_what_was_asked_for(world: World, tmp_path: Path, options: list[str], places: list[Any]) -> None:
    for number, command in enumerate((restore(world, tmp_path / "r", *options), world.patch(tmp_path / "p", *options))):
        if number:  # the world's own command asks for width 1
            command = [word for word in command if word not in ("--window", "1")] + (
                ["--window", "1"] * ("1" in options)
            )
        assert call(*command, "--quiet").code == 0
        frame = pd.read_parquet(Path(command[command.index("--out") + 1]) / "results.parquet")
        found = frame[["window", "centre", "first_layer", "last_layer"]].drop_duplicates().to_numpy().tolist()
        assert found == places


def test_restoring_everything_gives_the_base_back_exactly(world: World, tmp_path: Path) -> None:
    summary = told(*restore(world, tmp_path / "run", "--parameters", ".", "--window", "3", "--engine", "reference"))
    by_layers = {(row["first_layer"], row["last_layer"]): row for row in summary["curve"]}
    assert by_layers[0, 2]["krs"] == by_layers[0, 2]["krs_low"] == 1.0
    assert by_layers[0, 1]["krs"] < 1.0


def test_every_arm_is_in_the_table_and_in_the_summary(world: World, tmp_path: Path) -> None:
    arguments = ["--control", str(world.control), "--null", "2", "--window", "1", "--sites", "mlp_coef,attn_out"]
    donors = ["--donor", f"other-question,noise,{world.control}"]
    paths = ["--base", str(world.base), "--unlearned", str(world.unlearned), "--data", str(world.data)]
    summary = told("patch", *paths, "--out", str(tmp_path / "run"), *arguments, *donors)
    arms = [(row["arm"], row["target"], row["donor"]) for row in summary["arms"]]
    assert arms == [
        ("main", "unlearned", "base"),
        ("control", "control", "base"),
        *[(f"null-{seed}", "null", "base") for seed in range(2)],
        ("other-question", "unlearned", "other-question"),
        ("noise", "unlearned", "noise"),
        ("donor", "unlearned", str(world.control)),
    ]
    assert summary["donors"] == ["other-question", "noise", str(world.control)]
    frame = pd.read_parquet(tmp_path / "run" / "results.parquet")
    means = frame.groupby(["arm", "site", "centre"])["krs"].mean()
    nulls = frame[frame["arm"].isin(["null-0", "null-1"])].groupby(["site", "centre"])["krs"].mean()
    for peak in summary["peaks"]:
        place = peak["site"], peak["centre"]
        for arm, column in (
            ("control", "difference"),
            ("other-question", "minus_other_question"),
            ("noise", "minus_noise"),
            ("donor", "minus_donor"),
        ):
            assert peak[column] == pytest.approx(means["main", *place] - means[arm, *place], abs=1e-12)
        assert peak["null_krs"] == pytest.approx(nulls[place], abs=1e-12)
        assert peak["minus_null"] == pytest.approx(means["main", *place] - nulls[place], abs=1e-12)
        assert peak["minus_null_low"] <= peak["minus_null"] <= peak["minus_null_high"]
    again = call("plot", tmp_path / "run")
    assert again.code == 0 and "difference.html" in again.out


def test_table_has_a_line_per_site_and_window_and_what_each_arm_leaves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    more = ["--sites", "value_vectors,key_vectors+attn_out", "--window", "1", "--suffix", "--null", "1"]
    outcome = call(*restore(world, tmp_path / "run", "--control", str(world.control), *more))
    assert (outcome.code, outcome.err) == (0, "")
    assert "…" not in outcome.out
    lines = [line.split() for line in outcome.out.splitlines()]
    for label in (["value_vectors"], ["key_vectors+attn_out"]):
        assert lines.count(label) == 2, outcome.out
    assert sum(words[:1] == ["suffix:"] for words in lines) == 4
    assert any(words[-3:] == ["KRS", "-", "null"] for words in lines)


def test_reversed_direction_is_the_sweep_of_the_reversed_pair(world: World, tmp_path: Path) -> None:
    more = ["--sites", "value_vectors", "--window", "1"]
    reverse = told(*restore(world, tmp_path / "a", "--direction", "unlearned-to-base", *more))
    swapped = ["restore", "--base", str(world.unlearned), "--unlearned", str(world.base), "--data", str(world.data)]
    forward = told(*swapped, "--out", str(tmp_path / "b"), "--chunk-tokens", "100", *more)
    assert reverse["arms"][0]["target"] == "base"
    assert [row["krs"] for row in reverse["curve"]] == [row["krs"] for row in forward["curve"]]


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (["--sites", "mlp_coef"], ["--sites", "'mlp_coef'", "use dissect patch"]),
        (["--sites", "value_vector"], ["--sites", "'value_vector'", "did you mean 'value_vectors'?"]),
        (["--sites", "value_vectors+value_vectors"], ["--sites", "value_vectors+value_vectors"]),
        (["--parameters", "mlp.dwn_proj"], ["matches no parameter", "nearest names are", "mlp.down_proj.weight"]),
        (["--parameters", "mlp("], ["--parameters must be a regular expression"]),
        (["--layers", "1,3"], ["--layers", "between 0 and 2", "1,3"]),
        (["--layers", "2-1"], ["--layers", "2-1", "3,7,12-15"]),
        (["--layers", "last"], ["--layers", "'last'"]),
        (["--window", "2"], ["--window", "odd", "got 2"]),
        (["--window", ","], ["--window", "at least one"]),
        (["--direction", "sideways"], ["--direction", "base-to-unlearned", "sideways"]),
        (["--null", "-1"], ["--null", "at least 0, got -1"]),
        (["--donor", "noise"], ["--donor must be a model to restore value_vectors", "noise"]),
        (["--donor", "nobody"], ["nobody"]),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    world: World, tmp_path: Path, more: list[str], phrases: list[str]
) -> None:
    window = [] if "--window" in more or "--layers" in more else ["--window", "1"]
    assert_refused(call(*restore(world, tmp_path / "run", *window, *more)), *phrases)
    assert not (tmp_path / "run").exists()


def test_weights_are_no_activations(world: World, tmp_path: Path) -> None:
    refused = call(*world.patch(tmp_path / "run", "--sites", "value_vectors"))
    assert_refused(refused, "--sites", "value_vectors", "use dissect restore")


def test_donor_of_another_shape_is_refused(world: World, tmp_path: Path) -> None:
    other = save(tmp_path / "neox", build_neox())
    refused = call(*world.patch(tmp_path / "run", "--donor", str(other)))
    assert_refused(refused, "differ in architecture")
    assert not (tmp_path / "run").exists()


def test_null_of_a_pair_without_a_difference_is_refused(world: World, tmp_path: Path) -> None:
    refused = call(*world.patch(tmp_path / "run", "--null", "1", unlearned=world.base))
    assert_refused(refused, "--null", "the same weights")


def test_null_and_the_reference_engine_need_the_models_in_memory(world: World, tmp_path: Path) -> None:
    assert_refused(call(*world.patch(tmp_path / "run", "--null", "1", "--stream")), "--null", "--stream")
