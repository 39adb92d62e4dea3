"""`dissect decompose`: what it says, where it writes, what it refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dissect import zoo
from dissect.cli import decompose
from tests.command_lines import Outcome
from tests.dissect.cli.helpers import World, assert_refused, build_records, call, write_records


def arguments(world: World, out: Path | None, *more: str, **other: Path) -> list[str]:
    paths = {"base": world.base, "unlearned": world.unlearned, "data": world.data, **other}
    named = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    return ["decompose", *named, *([] if out is None else ["--out", str(out)]), *more]


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The directory of a finished run with a control and a null model, and what `--json` said of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, call(*arguments(world, out, "--control", str(world.control), "--null", "1", "--json"))


def test_json_is_the_only_thing_on_stdout_and_agrees_with_the_files(
    world: World, finished: tuple[Path, Outcome]
) -> None:
    run, outcome = finished
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told.pop("run") == str(run)
    names = ("krs.html", "shares.html", "direct.html", "decomposition.csv")
    assert [Path(path) for path in told.pop("figures")] == [run / "figures" / name for name in names]
    assert told == json.loads((run / "summary.json").read_text())
    assert told["base"] == str(world.base) and told["control"] == str(world.control)
    assert told["configuration"]["command"] == "decompose"
    frame = pd.read_parquet(run / "results.parquet")
    means = frame.groupby(["arm", "site", "first_layer", "last_layer", "term"])[["krs", "share"]].mean()
    for row in told["curve"]:
        if row["arm"] != "null":
            mean = means.loc[row["arm"], row["site"], row["first_layer"], row["last_layer"], row["term"]]
            assert row["krs"] == pytest.approx(mean["krs"], abs=1e-12)
            assert row["share"] == pytest.approx(mean["share"], abs=1e-12)


def test_the_tables_show_shares_and_scores_of_every_layer_in_a_narrow_terminal(
    world: World, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run, outcome = finished
    again = call(*arguments(world, run, "--control", str(world.control), "--null", "1"))
    assert again.code == 0
    assert again.err == f"dissect: {run} holds this run already; nothing was computed again\n"
    lines = again.out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines if line.startswith(" "))
    assert "…" not in again.out
    curve = json.loads(outcome.out)["curve"]
    krs, share = (
        {(r["arm"], r["site"], r["first_layer"], r["last_layer"], r["term"]): r[name] for r in curve}
        for name in ("krs", "share")
    )
    tables = again.out.split("shares of change | KRS (minus control)")
    assert len(tables) == 3
    for site, table in zip(("mlp_out", "attn_out"), tables[1:], strict=True):
        rows = {line.split()[0]: " ".join(line.split()) for line in reversed(table.splitlines()) if line.strip()}
        for layer, place in {"0": (0, 0), "1": (1, 1), "2": (2, 2), "all": (0, 2)}.items():
            shares = [share["main", site, *place, term] for term in ("weight", "coefficient", "interaction")]
            scores = [
                (krs["main", site, *place, term], krs["control", site, *place, term])
                for term in ("weight", "coefficient", "total")
            ]
            cells = [f"{value:.2f}" for value in shares]
            cells += [f"{ours:.2f} ({ours - theirs:+.2f})" for ours, theirs in scores]
            assert rows[layer] == " ".join([layer, *cells])
    for row in json.loads(outcome.out)["contrast"]:
        if (row["first_layer"], row["last_layer"]) == (0, 2) and row["term"] == "coefficient":
            for name in ("krs", "share"):
                low, high = (f"{row[f'{name}_{end}']:.2f}".replace("0.", ".") for end in ("low", "high"))
                assert f"{row[name]:.2f} [{low}, {high}]" in again.out
    assert again.out.count("minus control") == 4 and again.out.count("minus null") == 2
    assert f"figure  {run / 'figures' / 'krs.html'}\n" in again.out
    assert f"run     {run}\n" in again.out


def test_without_a_control_and_a_null_the_reader_is_told_what_is_missing(world: World, tmp_path: Path) -> None:
    outcome = call(*arguments(world, tmp_path / "run", "--sites", "mlp_out"))
    assert (outcome.code, outcome.err) == (0, "")
    assert "No control:" in outcome.out and "No null" in outcome.out
    assert "(minus control)" not in outcome.out


def test_quiet_says_nothing(world: World, tmp_path: Path) -> None:
    assert call(*arguments(world, tmp_path / "run", "--sites", "attn_out", "--quiet")) == Outcome(0, "", "")
    assert (tmp_path / "run" / "figures" / "shares.html").is_file()


def test_models_without_a_difference_give_null_and_lines_that_say_why(world: World, tmp_path: Path) -> None:
    outcome = call(*arguments(world, tmp_path / "run", "--json", unlearned=world.base))
    assert outcome.code == 0
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == ["dissect"] * 2
    assert "6 examples have no KRS in the main arm: " in outcome.err
    places = ", ".join(f"{site} {layer}" for site in ("mlp_out", "attn_out") for layer in range(3))
    assert f"6 examples have no share in the main arm ({places}): " in outcome.err
    told = json.loads(outcome.out, parse_constant=_not_json)
    assert {row["krs"] for row in told["curve"]} == {None} == {row["share"] for row in told["curve"]}


def _not_json(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (["--sites", "mlp_coef"], ["--sites", "mlp_out, attn_out", "'mlp_coef'"]),
        (["--null", "-1"], ["--null must be at least 0"]),
        (["--batch-size", "0"], ["--batch-size must be at least 1"]),
        (["--scoring", "exam"], ["--scoring", "exam", "answer or notebook"]),
        (["--format", "gif"], ["--format must be", "gif"]),
        (["--stream"], ["is streamed from disk", "turn --stream off"]),
        (["--control", "demo:nobody"], ["demo:nobody"]),
    ],
)
def test_bad_input_is_refused_in_one_line(world: World, tmp_path: Path, more: list[str], phrases: list[str]) -> None:
    assert_refused(call(*arguments(world, tmp_path / "run", *more)), *phrases)
    assert not (tmp_path / "run").exists()


def test_a_null_of_equal_models_is_refused(world: World, tmp_path: Path) -> None:
    outcome = call(*arguments(world, tmp_path / "run", "--null", "1", unlearned=world.base))
    assert_refused(outcome, "--null", "the same weights")


def test_default_directory_is_named_after_what_is_not_as_by_default(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_records(tmp_path / "two.jsonl", build_records(2))
    assert call(*arguments(world, None, "--sites", "attn_out", "--quiet", data=data)).code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["decompose-unlearned"]
    assert decompose.run_name("demo:npo", "notebook", 3) == "decompose-demo-npo-null3-notebook"


@pytest.mark.skipif(
    not (zoo.BUILTIN["demo:base"] / "config.json").is_file(),
    reason="the built-in models are not built yet: python -m dissect.zoo.build",
)
@pytest.mark.parametrize("family", ["demo", "demo-neox"])
def test_builtin_pair_runs_on_its_own_questions_with_its_own_control(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(
        *["decompose", "--base", f"{family}:base", "--unlearned", f"{family}:npo", "--limit", "2"],
        *["--sites", "mlp_out", "--json"],
    )
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told["run"] == f"runs/decompose-{family}-npo"
    assert told["control"] == f"{family}:never"
    shares = [row["share"] for row in told["curve"] if row["term"] == "coefficient" and row["arm"] == "main"]
    assert len(shares) > 2 and None not in shares
