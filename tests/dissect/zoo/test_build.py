"""A micro world, built end to end in seconds."""

import dataclasses
import io
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dissect.zoo.build import main
from dissect.zoo.builder import RECORD, build_family
from dissect.zoo.card import BEGIN, END, measure, write_card
from dissect.zoo.recipes import RECIPES, Architecture, Fitting, Recipe, Unlearning
from dissect.zoo.world import WorldSize
from unlearning.common.errors import InputError

MICRO = Recipe(
    family="micro",
    architecture=Architecture("llama", layers=2, d_model=16, d_mlp=32, heads=2, key_value_heads=1),
    pretraining=Fitting(learning_rate=1e-2, epochs=1),
    finetuning=Fitting(learning_rate=1e-2, epochs=1),
    unlearning={
        "npo": Unlearning(learning_rate=1e-3, epochs=1, options={"alpha": 2.0}),
        "whp": Unlearning(learning_rate=1e-3, epochs=1, options={"alpha": 2.0, "reinforced_epochs": 1}),
    },
    seed=3,
    world=WorldSize(forget_people=2, trunk_people=3, new_people=1, values=6, things=2, largest_summand=2),
    vocabulary=400,
)
MICRO_NEOX = dataclasses.replace(
    MICRO,
    architecture=Architecture("gpt_neox", layers=2, d_model=16, d_mlp=32, heads=2, key_value_heads=2),
)


def build(recipe, directory):
    return build_family(
        recipe, directory / "models", directory / "work", console=Console(file=io.StringIO()), progress=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("zoo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield directory, build(MICRO, directory)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "recipe", [pytest.param(MICRO, id="llama"), pytest.param(MICRO_NEOX, id="gpt_neox", marks=pytest.mark.slow)]
)
def test_two_builds_of_one_recipe_give_the_same_bytes(recipe, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for place in ("first", "second"):
            build(recipe, tmp_path / place)
    finally:
        torch.set_num_threads(threads)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first" / "models").rglob("*.*")]
    assert len([file for file in files if file.name == "model.safetensors"]) == len(MICRO.models)
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_every_model_differs_from_every_other(built):
    directory, _ = built
    assert len({(directory / "models" / name / "model.safetensors").read_bytes() for name in MICRO.models}) == len(
        MICRO.models
    )


def test_another_seed_gives_another_model(built, tmp_path):
    directory, _ = built
    build(MICRO.with_seed(4), tmp_path)
    ours = load_file(directory / "models" / "base" / "model.safetensors")
    theirs = load_file(tmp_path / "models" / "base" / "model.safetensors")
    assert not torch.equal(ours["model.layers.0.mlp.down_proj.weight"], theirs["model.layers.0.mlp.down_proj.weight"])


def test_a_stopped_build_goes_on_with_what_is_missing_and_ends_the_same(built, tmp_path):
    directory, _ = built
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "models" / "npo")
    kept = (copy / "models" / "base" / "model.safetensors").stat().st_mtime_ns
    build(MICRO, copy)
    assert (copy / "models" / "base" / "model.safetensors").stat().st_mtime_ns == kept
    ours, theirs = (place / "models" / "npo" / "model.safetensors" for place in (directory, copy))
    assert ours.read_bytes() == theirs.read_bytes()


def test_models_of_another_recipe_are_refused(built):
    directory, _ = built
    with pytest.raises(InputError, match="base.*another recipe|pretrained.*another recipe"):
        build(MICRO.with_seed(9), directory)


def test_a_directory_that_the_build_did_not_write_is_refused(tmp_path):
    (tmp_path / "work" / "pretrained").mkdir(parents=True)
    with pytest.raises(InputError, match="work/pretrained"):
        build(MICRO, tmp_path)


def test_the_card_states_what_was_measured(built, tmp_path):
    directory, seconds = built
    measured = measure(MICRO, directory / "models", seconds)
    card = tmp_path / "README.md"
    write_card(card, [measured])
    text = card.read_text(encoding="utf-8")
    block = text[text.index(BEGIN) : text.index(END)]
    assert "`micro:npo`" in block and "`demo:" not in block
    assert f"{100 * measured.scores['base']['general']:.1f}" in block
    assert f"{measured.parameters:,} parameters" in block


def test_the_command_names_what_is_in_the_way(tmp_path, capsys):
    (tmp_path / "models" / "demo" / "base").mkdir(parents=True)
    work = tmp_path / "work" / "demo" / "pretrained"
    work.mkdir(parents=True)
    (work / RECORD).write_text(f'{{"recipe": "{RECIPES["demo"].fingerprint("pretrained")}"}}')
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--family", "demo"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "base" in error and "Traceback" not in error


def test_an_unknown_family_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--family", "demo-gpt"])
    assert stopped.value.code == 2
    assert "demo-neox" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
