"""All experiments of the paper on a list of pairs: run end to end on a small one, averaged against a loop."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses.dissecting.command import evenly_spaced, main, read_pairs
from analyses.dissecting.report import PairOf, paper_average
from dissect import load_behave, load_decompose, load_probe, load_result
from dissect.prompts.prompts import Prompt, Prompts
from tests.dissect.cli.helpers import build_llama, build_records, save, with_noise, write_records
from unlearning.common.errors import InputError

EXPERIMENTS = ("patch", "restore", "decompose", "probe", "behave")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two pairs of five-layer models that share a base and a control."""
    folder = tmp_path_factory.mktemp("pairs")
    base = save(folder / "base", build_llama(layers=5))
    records = build_records(8)
    shared: dict[str, Any] = {
        "family": "tiny",
        "concept": "towns",
        "seed": 0,
        "base": str(base),
        "control": str(save(folder / "never", with_noise(build_llama(layers=5), seed=2))),
        "forget": str(write_records(folder / "forget.jsonl", records[:4])),
        "retain": str(write_records(folder / "retain.jsonl", records[4:])),
    }
    found = []
    for seed, method in ((1, "npo"), (3, "ga")):
        unlearned = save(folder / method, with_noise(build_llama(layers=5), seed=seed))
        found.append({"name": f"tiny-{method}", "method": method, "unlearned": str(unlearned), **shared})
    path = folder / "pairs.json"
    path.write_text(json.dumps(found))
    return path


def run(*arguments: str | Path) -> int:
    """The exit code of the command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_every_number_of_the_table_is_that_of_its_run(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, one = tmp_path / "out", tmp_path / "one.json"
    one.write_text(json.dumps(json.loads(pairs.read_text())[:1]))
    arguments = ["--pairs", one, "--no-builtin", "--null", "1", "--out", out, "--quiet"]
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    table = pd.read_csv(out / "findings.csv")
    assert len(told["findings"]) == len(table)
    runs = out / "tiny-npo"
    for experiment in EXPERIMENTS:
        assert json.loads((runs / experiment / "run.json").read_text())["status"] == "complete"
        assert list((runs / experiment / "figures").glob("*.html"))

    def found(experiment: str, quantity: str, of: str, layers: str) -> float:
        rows = table[(table["experiment"] == experiment) & (table["quantity"] == quantity)]
        rows = rows[(rows["of"] == of) & (rows["layers"].fillna("").astype(str) == layers)]
        assert len(rows) == 1, (quantity, of, layers)
        return float(rows["value"].iloc[0])

    frame = load_result(runs / "patch").frame
    whole = frame[(frame["window"] == "suffix") & (frame["first_layer"] == 0) & (frame["site"] == "attn_out")]
    mean = whole.groupby("arm")["krs"].mean()
    assert found("patch", "krs", "attn_out", "all") == pytest.approx(mean["main"])
    assert found("patch", "control_krs", "attn_out", "all") == pytest.approx(mean["control"])
    assert found("patch", "minus_null", "attn_out", "all") == pytest.approx(mean["main"] - mean["null-0"])
    frame = load_result(runs / "restore").frame
    ours = frame[(frame["window"] == "5") & (frame["arm"] == "main")].groupby(["first_layer", "last_layer"])["krs"]
    first, last = ours.mean().idxmax()
    layers = f"{first}-{last}"
    assert found("restore", "krs", "value_vectors", layers) == pytest.approx(ours.mean().max())
    terms = load_decompose(runs / "decompose").frame
    terms = terms[(terms["arm"] == "main") & (terms["first_layer"] == 0) & (terms["last_layer"] == 4)]
    weight = terms[(terms["site"] == "mlp_out") & (terms["term"] == "weight")]
    assert found("decompose", "krs", "weight", "all") == pytest.approx(weight["krs"].mean())
    changes = load_probe(runs / "probe").layers
    last_layer = changes[(changes["target"] == "unlearned") & (changes["layer"] == 4)]
    relative = last_layer.groupby("prompts")["relative_change"].mean()
    assert found("probe", "relative_change", "forget", "4") == pytest.approx(relative["forget"])
    ratio = relative["forget"] / relative["retain"]
    assert found("probe", "selectivity", "forget / retain", "4") == pytest.approx(ratio)
    said = load_behave(runs / "behave").frame
    rouge = said[(said["target"] == "unlearned") & (said["set"] == "retain")]["rouge_l"].mean()
    assert found("behave", "rouge_l", "retain", "") == pytest.approx(rouge)

    text = (out / "table.md").read_text()
    assert {line.count("|") for line in text.splitlines() if line} == {9, 11}
    assert text.count("| tiny-npo |") == 2 * 4 + 1  # two rows a site, and one of everything else
    assert (out / "figures" / "dissecting.html").is_file()

    def never(*_arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("dissect.engine.wavefront.sweep", never)
    assert run(*arguments) == 0
    assert (out / "table.md").read_text() == text


def test_the_average_is_over_questions_then_concepts_then_methods() -> None:
    """Two methods with two concepts and one with a second seed: unequal counts, so that the order matters."""
    rng = np.random.default_rng(0)
    runs = [("npo", "a", 0), ("npo", "a", 1), ("npo", "b", 0), ("ga", "a", 0)]
    values = {run: rng.random() for run in runs}

    def result(krs: float, site: str) -> Any:
        row = {
            **{"arm": "main", "target": "unlearned", "donor": "base", "site": site, "window": "5", "centre": 2},
            **{"first_layer": 0, "last_layer": 4, "krs": krs},
        }
        other = {**row, "window": "suffix", "krs": -9.0}  # another kind of window has no place in it
        return SimpleNamespace(curve=lambda: pd.DataFrame([row, other]))

    findings = [
        SimpleNamespace(
            pair=PairOf("n", "tiny", method, concept, seed, "", "", None, "", ""),
            patched=result(values[method, concept, seed], "mlp_coef"),
            restored=result(-values[method, concept, seed], "value_vectors"),
        )
        for method, concept, seed in runs
    ]
    average = paper_average(findings).set_index("site")  # type: ignore[arg-type]
    of_a = (values["npo", "a", 0] + values["npo", "a", 1]) / 2
    expected = ((of_a + values["npo", "b", 0]) / 2 + values["ga", "a", 0]) / 2
    assert average.loc["mlp_coef", "krs"] == pytest.approx(expected)
    assert average.loc["value_vectors", "krs"] == pytest.approx(-expected)
    assert average["n"].tolist() == [4, 4] and average["krs_low"].isna().all()


@pytest.mark.parametrize(("limit", "kept"), [(None, [*range(7)]), (7, [*range(7)]), (3, [0, 3, 6]), (1, [0])])
def test_a_limit_takes_prompts_from_all_over_the_file(limit: int | None, kept: list[int]) -> None:
    items = tuple(Prompt(str(n), "", "", "", (1, 2), 1, range(1)) for n in range(7))
    found = evenly_spaced(Prompts(items, "answer", 0, "nowhere"), limit)
    assert [int(item.id) for item in found.items] == kept


RECORD = asdict(PairOf("a", "f", "m", "c", 0, "b", "u", None, "x", "y"))


def test_pair_files_of_version_0_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    old = {("unrelated" if key == "retain" else key): value for key, value in RECORD.items()}
    path.write_text(json.dumps([old]))
    assert read_pairs(path) == [PairOf(**RECORD)]


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", "no JSON"),
        ("[]", "not a list of pairs"),
        ('{"name": "a"}', "not a list of pairs"),
        (json.dumps([RECORD, {**RECORD, "methd": "npo"}]), "pair 2: wrong or missing: methd"),
        (json.dumps([{key: RECORD[key] for key in RECORD if key != "forget"}]), "pair 1: wrong or missing: forget"),
        ("[1]", "pair 1: wrong or missing: not an object"),
    ],
)
def test_a_broken_list_of_pairs_is_refused(tmp_path: Path, content: str, phrase: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(InputError, match=phrase):
        read_pairs(path)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--no-builtin"], "no pairs"),
        (["--method", "npoo"], "no pair was unlearned by it; there are blur, dpo, grad_diff, npo"),
        (["--no-builtin", "--pairs", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--tofu", "nowhere"], "analyses.tofu_pair"),
        (["--format", "gif"], "--format must be"),
        (["--limit", "0"], "--limit 0: at least 1"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], phrase: str
) -> None:
    assert run(*arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and phrase in error
    assert not (tmp_path / "out").exists()


def test_two_pairs_of_one_name_are_refused(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(pairs.read_text())
    twice = tmp_path / "pairs.json"
    twice.write_text(json.dumps([records[0], records[0]]))
    assert run("--pairs", twice, "--no-builtin", "--out", tmp_path / "out") == 2
    assert "two pairs are called tiny-npo" in capsys.readouterr().err
