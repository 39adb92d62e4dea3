"""A run on disk: whole or not there, recognised, refused, and read by plain transformers."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.other_process import other_process
from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import Example, InputError, train
from unlearning.checkpoints.locate import RECORD
from unlearning.training.output_directory import (
    WHOLE,
    abandon_run,
    begin_run,
    claimed,
    finish_run,
    hash_examples,
    last_checkpoint,
    read_run,
    remove_broken_checkpoints,
    saying_disk_full,
    tidy_checkpoints,
)

CONFIGURATION = {"method": "npo", "options": {"seed": 0, "beta": 0.1}, "forget_data": "a" * 64}
FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "progress": False, "device": "cpu", "max_steps": 2}


def write_nothing(directory: Path) -> None:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")


def add_checkpoint(run: Path, step: int, *, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if whole:
        (folder / WHOLE).write_text("{}")
    return folder


def test_a_free_directory_has_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for free in (tmp_path / "empty", tmp_path / "missing", tmp_path / "deep" / "er"):
        assert read_run(free, CONFIGURATION) is None
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]  # asking made nothing


def test_a_begun_run_is_recognised_and_another_refused(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    begin_run(run, CONFIGURATION)
    assert read_run(run, CONFIGURATION) == {"finished": False, "configuration": CONFIGURATION}
    assert read_run(run, {"method": "npo"}) is not None  # before the model is hashed
    for changes, words in (
        ({"method": "ga"}, "method is 'npo' there, 'ga' now"),
        ({"options": {"seed": 1, "beta": 0.1}}, "seed is 0 there, 1 now"),
        ({"forget_data": "b" * 64}, "its forget data differ"),
        ({"start_weights": "c" * 64}, "its weights before training differ"),
    ):
        with pytest.raises(InputError) as error:
            read_run(run, {**CONFIGURATION, **changes})
        assert f"`output_dir` {run}" in str(error.value) and f"another configuration: {words}." in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', '{"finished": true}'])
def test_what_is_no_run_is_left_alone(content: str | None, tmp_path: Path) -> None:
    name = "thesis.tex" if content is None else RECORD
    (tmp_path / name).write_text(content or "years of work")
    with pytest.raises(InputError, match=f"`output_dir`.*{tmp_path}.*other files"):
        read_run(tmp_path, CONFIGURATION)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_where_no_directory_can_be_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(InputError, match=f"`output_dir`.*{file}"):
        read_run(file, CONFIGURATION)
    for below in (file / "run", file / "deep" / "run"):
        with pytest.raises(InputError, match=f"`output_dir`.*{file} is a file"):
            train("npo", model="/nowhere", tokenizer=object(), output_dir=below, **SHARED)  # type: ignore[arg-type]


def test_a_directory_that_another_process_trains_into_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """Both would be saved, and one model would be gone."""
    run = tmp_path / "deep" / "run"

    claim = claimed(run)
    with other_process(claim.__enter__) as child:
        with pytest.raises(InputError, match=f"{run} is being written by process {child} on .*, since"):
            train("npo", model=model_dir, output_dir=run, **SHARED)
        assert [path.name for path in run.parent.iterdir()] == [".run.lock"]
    train("npo", model=model_dir, output_dir=run, **SHARED)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=f"`output_dir`.*{tmp_path} is not writable"):
        read_run(tmp_path / "run", CONFIGURATION)


def test_the_last_whole_checkpoint_counts_by_its_step(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    nine, ten = add_checkpoint(tmp_path, 9), add_checkpoint(tmp_path, 10)
    broken = add_checkpoint(tmp_path, 11, whole=False)
    add_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoints" / "best").mkdir()
    assert last_checkpoint(tmp_path) == ten
    remove_broken_checkpoints(tmp_path)
    assert not broken.exists() and nine.is_dir() and (tmp_path / "checkpoints" / "best").is_dir()


def test_an_abandoned_run_leaves_what_is_whole(tmp_path: Path) -> None:
    for name, whole in (("nothing", None), ("half", False), ("whole", True)):
        begin_run(tmp_path / name, CONFIGURATION)
        if whole is not None:
            add_checkpoint(tmp_path / name, 5, whole=whole)
        abandon_run(tmp_path / name)
    abandon_run(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert last_checkpoint(tmp_path / "whole") is not None


def test_a_run_is_finished_beside_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin_run(run, CONFIGURATION)
    add_checkpoint(run, 5)
    finish_run(run, write_nothing, {"finished": True, "configuration": CONFIGURATION}, "card", is_main=True)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "checkpoints", "model.safetensors", RECORD]
    assert json.loads((run / RECORD).read_text())["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_stays_of_a_finished_runs_checkpoints_is_said(tmp_path: Path) -> None:
    for name, keep in (("kept", 2), ("removed", 0), ("none", 2)):
        run = tmp_path / name
        for step in (3, 6) if name != "none" else ():
            add_checkpoint(run, step)
        (run / "checkpoints" / "best").mkdir(parents=True)
        said = tidy_checkpoints(run, keep)
        assert (run / "checkpoints").exists() == (said is not None) == (name == "kept")
    kept = tmp_path / "kept" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    said = tidy_checkpoints(tmp_path / "kept", 2)
    assert said is not None and said.startswith("2 checkpoints of the finished run, 1.8e-08 GB, in ")  # 18 bytes
    assert str(kept) in said and "keep_checkpoints=0" in said
    assert tidy_checkpoints(tmp_path / "missing", 0) is None


def test_a_run_says_where_its_checkpoints_are_or_removes_them(model_dir: Path, tmp_path: Path) -> None:
    kept = train("ga", model=model_dir, output_dir=tmp_path / "kept", save_every=1, **SHARED)
    assert str(tmp_path / "kept" / "checkpoints") in kept.notes["checkpoints"][0]
    settings = {**SHARED, "keep_checkpoints": 0, "keep_best": "forget_nll", "save_every": 1}
    removed = train("ga", model=model_dir, output_dir=tmp_path / "removed", **settings)
    assert "checkpoints" not in removed.notes and not (tmp_path / "removed" / "checkpoints").exists()
    assert train("ga", model=model_dir, output_dir=tmp_path / "removed", **settings).already_done


def test_an_empty_folder_of_checkpoints_does_not_stay(tmp_path: Path) -> None:
    """A method that writes what it made first has the directory begun, though nothing is saved on the way."""
    run = tmp_path / "run"
    begin_run(run, CONFIGURATION)
    (run / "checkpoints").mkdir()
    finish_run(run, write_nothing, {"finished": True}, "card", is_main=True)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "model.safetensors", RECORD]


def test_the_record_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it, the run is unfinished still, whatever else lies there."""
    run = tmp_path / "run"
    begin_run(run, CONFIGURATION)
    add_checkpoint(run, 5)
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target) == run / RECORD:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_run(run, write_nothing, {"finished": True, "configuration": CONFIGURATION}, "card", is_main=True)
    assert (run / "model.safetensors").is_file()
    record = read_run(run, CONFIGURATION)
    assert record is not None and not record["finished"]
    finish_run(run, write_nothing, {"finished": True, "configuration": CONFIGURATION}, "card", is_main=True)
    assert (read_run(run, CONFIGURATION) or {})["finished"]


@pytest.mark.parametrize("act", ["error", "interrupt"])
def test_an_end_that_fails_leaves_no_model(act: str, tmp_path: Path) -> None:
    def failing(directory: Path) -> None:
        write_nothing(directory)
        if act == "interrupt":
            signal.raise_signal(signal.SIGINT)
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt if act == "interrupt" else InputError):
        finish_run(tmp_path / "run", failing, {}, "card", is_main=True)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_a_killed_end_is_no_obstacle(tmp_path: Path) -> None:
    write_nothing(tmp_path / ".run.partial")
    (tmp_path / ".run.partial" / "old").write_text("of a killed process")
    finish_run(tmp_path / "run", write_nothing, {"finished": True}, "card", is_main=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["README.md", "model.safetensors", RECORD]


def test_a_leftover_beside_a_finished_run_is_removed(model_dir: Path, tmp_path: Path) -> None:
    """Killed when the last file had been moved."""
    run = tmp_path / "run"
    train("npo", model=model_dir, output_dir=run, **SHARED)
    (tmp_path / ".run.partial").mkdir()
    assert train("npo", model=model_dir, output_dir=run, **SHARED).already_done
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_directory_becomes_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File by file, a kill would leave a model without its record, which no later run may replace."""
    moves: list[str] = []
    real = os.replace

    def noted(source: Any, target: Any) -> None:
        moves.append(Path(target).name)
        real(source, target)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "replace", noted)
    finish_run(tmp_path / "run", write_nothing, {"finished": True}, "card", is_main=True)
    assert moves == [RECORD, "run"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (PermissionError(13, "denied"), ValueError("broken"), RuntimeError("no")):
        with pytest.raises(type(error)), saying_disk_full(tmp_path):
            raise error


def test_hashes_are_of_texts_in_their_order() -> None:
    one, two = Example("a", "b"), Example("c", "d")
    assert hash_examples(None) is None
    assert hash_examples([one, two]) == hash_examples([Example("a", "b"), Example("c", "d")])
    hashes = {
        hash_examples(each) for each in ([], [one], [one, two], [two, one], [Example("ab", "")], [Example("", "ab")])
    }
    assert len(hashes) == 6


def test_plain_transformers_loads_what_is_saved(model_dir: Path, tmp_path: Path) -> None:
    result = train("npo", model=model_dir, output_dir=tmp_path / "run", save_every=1, learning_rate=1e-2, **SHARED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    text = FORGET[0].prompt
    assert tokenizer(text)["input_ids"] == result.tokenizer(text)["input_ids"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, result.model(ids).logits)
        assert not torch.equal(model(ids).logits, build_tiny_llama()(ids).logits)
    assert model.config.use_cache
    assert not [
        path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or path.suffix == ".bin"
    ]


def test_a_link_that_leads_nowhere_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "itself").symlink_to("itself")
    for name in ("nowhere", "itself", "nowhere/run", "itself/run", "nowhere/a/run"):
        with pytest.raises(InputError, match="`output_dir` must be .*link that leads nowhere"):
            read_run(tmp_path / name, CONFIGURATION)
        with (
            pytest.raises(InputError, match="`output_dir` must be .*link that leads nowhere"),
            claimed(tmp_path / name),
        ):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["itself", "nowhere"]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "b/" * 3000])
def test_a_name_that_no_directory_can_have_is_refused_before_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^`output_dir`: "):
        read_run(tmp_path / name, CONFIGURATION)
    with pytest.raises(InputError, match="^`output_dir`: "), claimed(tmp_path / name):
        pass


@pytest.mark.parametrize("length", [245, 252, 255])
def test_a_name_that_leaves_no_room_for_what_stands_beside_it_is_refused_before_training(
    length: int, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^`output_dir`: .*[Nn]ame too long"), claimed(tmp_path / ("a" * length)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["[" * 200_000, '{"configuration": [1]}', '{"configuration": ' + "9" * 5000 + "}"])
def test_a_broken_record_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InputError, match="which holds other files"):
        read_run(tmp_path, CONFIGURATION)


def test_a_pipe_as_record_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(InputError, match="which holds other files"):
        read_run(tmp_path, CONFIGURATION)


def test_a_run_is_finished_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    with claimed(tmp_path / "link"):
        assert (tmp_path / ".far.lock").is_file()
        finish_run(tmp_path / "link", write_nothing, {"finished": True}, "card", is_main=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link"]


def test_an_empty_directory_that_cannot_be_replaced_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def mounted(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "run":
            raise OSError(16, "Device or resource busy")
        real(source, target)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "replace", mounted)
    finish_run(tmp_path / "run", write_nothing, {"finished": True}, "card", is_main=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and (tmp_path / "run" / RECORD).is_file()


@pytest.mark.parametrize("begun", [False, True])
def test_a_model_that_cannot_be_moved_stays_and_is_named(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", os.replace
    if begun:
        begin_run(run, CONFIGURATION)

    def failing(source: Any, target: Any) -> None:
        if run in (Path(target), Path(target).parent):
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match=r"cannot be moved there: Invalid .*\. It is in .*\.run\.partial"):
        finish_run(run, write_nothing, {"finished": True}, "card", is_main=True)
    kept = sorted(path.name for path in (tmp_path / ".run.partial").iterdir())
    assert kept == ["README.md", "model.safetensors", RECORD]


def test_half_a_character_in_a_name_does_not_lose_the_model(tmp_path: Path) -> None:
    record = {"finished": True, "configuration": CONFIGURATION, "model": "caf\udce9"}
    finish_run(tmp_path / "run", write_nothing, record, "caf\udce9", is_main=True)
    assert read_run(tmp_path / "run", CONFIGURATION) == record
