import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import unlearning
from analyses.tofu_pair import command as tofu_pair
from analyses.tofu_pair.data import DATA_VARIABLE, select_authors
from analyses.tofu_pair.models import MODELS, UNLEARNED, Architecture, Recipe, Schedule, Workshop, train_tokenizer
from tests.analyses.helpers import needs_tofu, real_tofu, write_imitation
from unlearning.common.errors import InputError

MICRO = Recipe(
    trunk_authors=1,
    late_authors=1,
    forget_authors=1,
    architecture=Architecture(vocab_size=800, d_model=96, d_mlp=256, n_layers=2, n_heads=4, n_kv_heads=2),
    trunk=Schedule(epochs=(24,), learning_rate=5e-3, batch_size=4),
    base=Schedule(epochs=(18, 24), learning_rate=4e-3, batch_size=4),
    npo=Schedule(epochs=(6, 10, 16), learning_rate=1e-3, alpha=20.0),
    grad_diff=Schedule(epochs=(6, 10, 16), learning_rate=1e-3, gamma=0.1),
    base_recall=0.85,
    forget_margin=0.15,
    retain_floor=0.5,
)
"""Three real authors and a third of a million parameters: half a minute, and still a pair that knows and forgot."""

TINY = replace(
    MICRO,
    architecture=Architecture(vocab_size=300, d_model=16, d_mlp=32, n_layers=1, n_heads=2, n_kv_heads=1),
    trunk=Schedule(epochs=(1,), learning_rate=1e-3),
    base=Schedule(epochs=(1,), learning_rate=1e-3),
    npo=Schedule(epochs=(1,), learning_rate=1e-4),
    grad_diff=Schedule(epochs=(1,), learning_rate=1e-4),
    base_recall=0.0,
    forget_margin=1.0,
    retain_floor=0.0,
)
"""Trains in a second and aims at nothing: for what is on disk."""


def tiny_workshop(tmp_path: Path, recipe: Recipe = TINY) -> Workshop:
    folder = tmp_path / "tofu"
    if not folder.exists():
        write_imitation(folder)
    subset = select_authors(folder, trunk=1, late=1, forget=1, seed=recipe.seed)
    return Workshop(recipe, subset, tmp_path / "models", device="cpu", progress=False)


def never_called(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("trained again")


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which TINY was built; for tests that leave it as it is."""
    where = tmp_path_factory.mktemp("tiny")
    tiny_workshop(where).build()
    return where


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tofu") / "run"
    return out, tofu_pair.run(MICRO, data=real_tofu(), out=out, device="cpu", progress=False)


@needs_tofu
def test_run_makes_models_that_know_and_that_forgot(micro_run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = micro_run
    models = json.loads((out / "quality.json").read_text())["models"]
    recall = {(name, on): models[name][on]["rouge_l_recall"] for name in MODELS for on in ("forget", "retain")}
    assert recall["base", "forget"] >= 0.85
    assert recall["base", "retain"] >= 0.8
    assert recall["never", "forget"] < 0.4
    assert recall["never", "retain"] >= 0.8
    for name in UNLEARNED:
        assert recall[name, "forget"] <= recall["never", "forget"] + 0.15
        assert recall[name, "retain"] >= 0.5
    assert models["never"]["stage"]["steps"] == models["base"]["stage"]["steps"]


@needs_tofu
def test_run_patches_the_forget_questions_with_never_as_the_control(micro_run: tuple[Path, dict[str, Any]]) -> None:
    out, report = micro_run
    forget = [json.loads(line) for line in (out / "data" / "forget.jsonl").read_text().splitlines()]
    for name in UNLEARNED:
        frame = pd.read_parquet(out / f"patch-{name}" / "results.parquet")
        assert set(frame["target"]) == {"unlearned", "control"}
        assert set(frame["example"]) == {record["id"] for record in forget}
        assert set(frame["group"]) == {record["group"] for record in forget}
        assert Path(report["figures"][name]).stat().st_size > 10_000
        best = frame[frame["target"] == "unlearned"].groupby(["site", "centre"])["krs"].mean().groupby("site").max()
        reported = {row["site"]: row["krs"] for row in report["patching"][name]}
        assert reported == pytest.approx(best.to_dict(), abs=1e-6)


@needs_tofu
def test_run_again_trains_and_measures_nothing(
    micro_run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = micro_run
    monkeypatch.setattr(unlearning, "train", never_called)
    monkeypatch.setattr("analyses.tofu_pair.models.greedy_answers", never_called)
    again = tofu_pair.run(MICRO, data=real_tofu(), out=out, device="cpu", progress=False)
    assert again == report


@needs_tofu
def test_tables_show_every_model_and_site(micro_run: tuple[Path, dict[str, Any]]) -> None:
    from rich.console import Console

    _, report = micro_run
    printed = io.StringIO()
    console = Console(width=80, file=printed)  # a terminal of the usual width cuts no name short
    console.print(tofu_pair.quality_table(report["quality"]))
    console.print(tofu_pair.peaks_table(report["patching"], report["examples"], report["window"]))
    text = printed.getvalue()
    assert "…" not in text
    assert all(name in text for name in (*MODELS, *tofu_pair.SITES))


def test_build_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = tiny_workshop(tmp_path)
    train, calls = unlearning.train, []

    def killed_in_never(method: str, **options: Any) -> Any:
        calls.append(options["output_dir"].name)
        if options["output_dir"].name == ".never.partial":
            options["output_dir"].mkdir()
            (options["output_dir"] / "config.json").write_text("{")
            raise KeyboardInterrupt
        return train(method, **options)

    monkeypatch.setattr(unlearning, "train", killed_in_never)
    with pytest.raises(KeyboardInterrupt):
        workshop.build()
    assert calls == [".trunk.partial", ".base.partial", ".never.partial"]
    assert sorted(path.name for path in workshop.folder.iterdir() if path.name[0] != ".") == ["base", "trunk"]
    kept = (workshop.directory("base") / "model.safetensors").read_bytes()

    calls.clear()
    monkeypatch.setattr(
        unlearning, "train", lambda method, **o: calls.append(o["output_dir"].name) or train(method, **o)
    )
    workshop.build()
    assert calls == [".never.partial", ".npo.partial", ".grad_diff.partial"]
    assert sorted(path.name for path in workshop.folder.iterdir()) == sorted(MODELS)
    assert (workshop.directory("base") / "model.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"trunk": Schedule(epochs=(2,), learning_rate=1e-3)}], ids=["seed", "schedule"]
)
def test_build_refuses_models_of_another_recipe(tiny_models: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"trunk: holds a model of another recipe.*out"):
        tiny_workshop(tiny_models, replace(TINY, **change)).build()


def test_build_keeps_what_a_later_stage_has_no_part_in(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(TINY, grad_diff=Schedule(epochs=(2,), learning_rate=1e-4))
    monkeypatch.setattr(unlearning, "train", never_called)
    with pytest.raises(InputError, match=r"grad_diff: holds a model of another recipe"):
        tiny_workshop(tiny_models, changed).build()


def test_build_refuses_a_directory_of_something_else(tmp_path: Path) -> None:
    workshop = tiny_workshop(tmp_path)
    workshop.directory("trunk").mkdir(parents=True)
    (workshop.directory("trunk") / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"trunk: holds other files.*out"):
        workshop.build()
    assert (workshop.directory("trunk") / "notes.txt").read_text() == "mine"


def test_build_refuses_a_base_that_does_not_know(tmp_path: Path) -> None:
    workshop = tiny_workshop(tmp_path, replace(TINY, base_recall=0.9))
    with pytest.raises(InputError, match=r"base: ROUGE-L recall is 0\.\d\d after 1 epochs, below 0\.9"):
        workshop.build()
    assert not workshop.directory("base").exists()


def test_train_tokenizer_gives_any_text_back() -> None:
    tokenizer = train_tokenizer(["Who is it? It is Ana María."], vocab_size=300, context=64)
    for text in ("Who is it? It is Ana María.", "naïve – 東京\n\ttabs", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_recipe_with_authors_keeps_most_of_them_in_the_trunk() -> None:
    for n_authors in (3, 10, 30, 60):
        recipe = Recipe().with_authors(n_authors)
        assert recipe.trunk_authors + recipe.late_authors + recipe.forget_authors == n_authors
        assert min(recipe.late_authors, recipe.forget_authors) >= 1
    assert Recipe().with_authors(40) == Recipe()
    with pytest.raises(InputError, match="authors.*at least 3.*2"):
        Recipe().with_authors(2)


def test_write_data_refuses_other_authors(tmp_path: Path) -> None:
    folder = write_imitation(tmp_path / "tofu")
    first, other = (select_authors(folder, trunk=2, late=1, forget=1, seed=seed) for seed in (0, 1))
    tofu_pair.write_data({"forget": first.forget, "retain": first.retain}, tmp_path / "data")
    tofu_pair.write_data({"forget": first.forget, "retain": first.retain}, tmp_path / "data")
    with pytest.raises(InputError, match=r"\.jsonl: holds other authors' questions.*out"):
        tofu_pair.write_data({"forget": other.forget, "retain": other.retain}, tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "/nowhere: must hold tofu/full.json or full.json"),
        ([], f"--data must be given, or {DATA_VARIABLE}"),
        (["--authors", "many"], "Invalid value for '--authors'"),
    ],
)
def test_main_exits_2_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stopped:
        tofu_pair.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from analyses.tofu_pair import command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "python -m analyses.tofu_pair --data ../shared/data" in shown.stdout
