"""Every model of the TOFU pair judged twice: on built-in models in its place, with the two cheapest tests."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pandas as pd
import pytest
from typer.testing import CliRunner

import unlearning
from analyses.tofu_pair import verdicts as tofu_verdicts
from analyses.tofu_pair.verdicts import TWIN, TWIN_SEED, app, build_twin, run, table
from dissect import zoo
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry
from dissect.stress.lenses import logit_lens
from dissect.stress.without_attack import without_attack
from dissect.verdicts.rule import RuleEntry, frozen_rule
from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
from unlearning.common.errors import InputError

RULE = replace(
    frozen_rule(),
    tests=(RuleEntry("logit_lens"),),
    needed=(RuleEntry("logit_lens"),),
    floor=0.0,
    ceiling=1.0,
    run_sd=0.0,
    suppressed_above=0.1,
    margin=0.3,
)

CHEAP = [Entry(test.__name__, dict.fromkeys(catalogue.BUDGETS, test)) for test in (without_attack, logit_lens)]


def _not_again(_case: object) -> NoReturn:
    raise AssertionError("tested again")


@pytest.fixture
def tofu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The built-in base and never model as a TOFU pair, and a twin that never knew: never itself."""
    monkeypatch.setattr(catalogue, "entries", lambda *_: CHEAP)
    monkeypatch.setattr("dissect.verdicts.run.frozen_rule", lambda **_: RULE)
    for name in ("base", "never"):
        _link(tmp_path / "tofu" / "models" / name, zoo.resolve(f"demo:{name}"))
    for name, asked in (("forget_perturbed", "forget"), ("retain", "retain")):
        _link(tmp_path / "tofu" / "data" / f"{name}.jsonl", zoo.question_set(asked))
    _link(tmp_path / "twins" / TWIN, zoo.resolve("demo:never"))
    _link(tmp_path / "methods" / "models" / "npo", zoo.resolve("demo:npo"))
    monkeypatch.setattr(tofu_verdicts, "build_twin", lambda *_, **__: tmp_path / "twins" / TWIN)
    return tmp_path


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def test_every_model_is_judged_with_a_never_model_and_without(tofu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = (tofu / "tofu", tofu / "methods", tofu / "out")
    frame = run(*where, limit=16, progress=False)
    assert frame[["model", "control"]].to_numpy().tolist() == [
        [model, arm] for model in (TWIN, "npo") for arm in ("with", "without")
    ]
    twin = frame.iloc[0]
    # Neither of the two cheap tests attacks the model, so nothing is called erased.
    assert (twin["verdict"], twin["score"], twin["strongest"]) == ("inconclusive", 0.0, "logit_lens")
    for row in frame.to_dict("records"):
        said = json.loads((tofu / "out" / row["control"] / row["model"] / "verdict.json").read_text())
        assert (
            said["verdict"] == row["verdict"]
            and said["against"] == {"with": "control", "without": "floor"}[row["control"]]
        )
        assert said["residual_knowledge"]["score"] == row["score"] and said["utility"]["share"] == row["utility"]
    pd.testing.assert_frame_equal(
        pd.read_csv(tofu / "out" / "findings.csv")[["model", "score"]], frame[["model", "score"]]
    )

    monkeypatch.setattr(
        catalogue,
        "entries",
        lambda *_: [replace(one, runs=dict.fromkeys(catalogue.BUDGETS, _not_again)) for one in CHEAP],
    )
    again = run(*where, limit=16, progress=False)  # from the directory
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), frame.drop(columns="seconds"))


def test_the_table_has_a_row_a_model_and_no_score_where_there_is_none() -> None:
    rows = [
        ("npo", "with", "suppressed", 0.5, 0.25, 0.75, 0.9, "relearn_benign:accuracy"),
        ("npo", "without", "inconclusive", None, None, None, 0.9, ""),
    ]
    names = ["model", "control", "verdict", "score", "low", "high", "utility", "strongest"]
    lines = table(pd.DataFrame(rows, columns=names)).splitlines()
    assert lines[2:] == [
        "| `npo` | 0.90 | **suppressed** | 0.50 [0.25, 0.75] | relearn_benign (accuracy) | inconclusive |  |"
    ]


def test_the_twin_is_trained_as_never_was_in_another_order(tmp_path: Path) -> None:
    models, retain = tmp_path / "models", tmp_path / "retain.jsonl"
    build_tiny_llama(0).save_pretrained(models / "trunk")
    build_tokenizer().save_pretrained(models / "trunk")
    retain.write_text("".join(json.dumps({"question": f"one {n}", "answer": f"two {n}"}) + "\n" for n in range(6)))
    with pytest.raises(InputError, match="holds no control. Run `python -m analyses.tofu_pair"):
        build_twin(models, retain, progress=False)
    options = {"max_steps": 3, "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 1}
    unlearning.train(
        "finetune", model=models / "trunk", retain=retain, output_dir=models / "never", progress=False, **options
    )
    twin = build_twin(models, retain, progress=False)
    own, others = (
        json.loads((models / name / "unlearning.json").read_text())["configuration"] for name in (TWIN, "never")
    )
    assert own["options"] == others["options"] | {"seed": TWIN_SEED}
    assert {name for name in own if own[name] != others[name]} == {"options"}
    weights = [(models / name / "model.safetensors").read_bytes() for name in (TWIN, "never")]
    assert weights[0] != weights[1]
    stamp = (twin / "model.safetensors").stat().st_mtime_ns
    assert build_twin(models, retain, progress=False) == twin
    assert (twin / "model.safetensors").stat().st_mtime_ns == stamp


def test_directories_without_models_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--methods", str(tmp_path)], standalone_mode=False)
    assert isinstance(done.exception, InputError) and "analyses.unlearning_methods --tofu" in str(done.exception)
