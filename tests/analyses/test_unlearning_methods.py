"""The comparison of methods: trained once, asked everything, gone on with, told with its commands."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analyses.unlearning_methods import DEMO, TOFU, Entry, World, app, built_in_entries, figure, run, tofu_world
from tests.unlearning.helpers import build_examples, build_tiny_llama, build_tokenizer
from unlearning.cli import app as unlearn
from unlearning.common.errors import InputError
from unlearning.methods import METHODS, get_method
from unlearning.options import resolve_options


@pytest.fixture
def world(tmp_path: Path) -> World:
    for name, seed in (("base", 0), ("never", 1)):
        build_tiny_llama(seed).save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    records = [asdict(example) for example in build_examples()]
    return World(
        name="tiny",
        base=str(tmp_path / "base"),
        control=str(tmp_path / "never"),
        forget=records[:3],
        retain=records[3:],
        asked={"forget": records[:3], "retain": records[3:]},
        shared={"max_steps": 2, "learning_rate": 1e-3},
        entries=(Entry("ga", "ga"), Entry("npo_rt", "npo", {"alpha": 2.0})),
    )


def test_every_method_is_trained_and_asked(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    frame = run(world, out, progress=False)
    assert list(dict.fromkeys(frame["model"])) == ["base", "never", "ga", "npo_rt"]
    assert len(frame) == 4 * 2
    nll = frame.pivot(index="model", columns="asked", values="nll")
    assert nll.loc["ga", "forget"] > nll.loc["base", "forget"]  # ascent, however short
    assert nll.loc["never", "forget"] != nll.loc["base", "forget"]
    assert frame.groupby("model")["steps"].first().to_dict()["ga"] == 2
    pd.testing.assert_frame_equal(
        pd.read_csv(out / "findings.csv", keep_default_na=False)[["model", "asked"]], frame[["model", "asked"]]
    )

    again = run(world, out, names=["ga"], progress=False)  # from the directory
    one, other = (f[f["model"] == "ga"].reset_index(drop=True) for f in (frame, again))
    pd.testing.assert_frame_equal(one, other)
    forget, retain = figure(frame, "title").data
    assert list(forget.y) == list(retain.y) == ["base", "never", "ga", "npo_rt"]
    assert list(forget.x) == frame[frame["asked"] == "forget"]["rouge"].tolist()

    with pytest.raises(InputError, match="holds other data"):
        run(replace(world, forget=world.forget[:1]), out, progress=False)
    with pytest.raises(InputError, match="--method gaa: not in the tiny's table; did you mean 'ga'"):
        run(world, out, names=["gaa"], progress=False)


def test_the_table_holds_commands_that_make_the_models(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(world, out, progress=False)
    text = (out / "table.md").read_text()
    assert text.count("| `") == 4
    (command,) = [line for line in text.splitlines() if line.startswith("unlearn train ga")]
    done = CliRunner().invoke(unlearn, [*shlex.split(command)[1:], "--quiet", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["already_done"]


@pytest.mark.parametrize("entry", [*DEMO, *built_in_entries(), *TOFU], ids=lambda entry: entry.name)
def test_options_of_the_table_exist(entry: Entry) -> None:
    own, shared = resolve_options(entry.method, get_method(entry.method).options, dict(entry.options))
    resolved = {**asdict(own), **asdict(shared)}
    assert {name: resolved[name] for name in entry.options} == dict(entry.options)


def test_the_table_has_every_method() -> None:
    assert {entry.method for entry in (*DEMO, *built_in_entries())} == set(METHODS) - {"finetune"}


def test_a_tofu_directory_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `python -m analyses.tofu_pair --out"):
        tofu_world(tmp_path)
    done = CliRunner().invoke(app, ["--tofu", str(tmp_path)], standalone_mode=False)
    assert isinstance(done.exception, InputError)
