"""`unlearn cache`: a list for a reader and a program, and clearing that keeps what is in use."""

import fcntl
import gc
import json
import os
from pathlib import Path

import pytest

from tests.unlearning.cli.test_train import run
from tests.unlearning.helpers import build_examples


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_training_kept_is_listed_and_cleared(
    model_dir: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cache") == 0
    assert f"nothing in {root}" in capsys.readouterr().out
    forget = tmp_path / "forget.json"
    forget.write_text(json.dumps([{"prompt": e.prompt, "answer": e.answer} for e in build_examples()[:3]]))
    train = ["train", "npo", "--model", str(model_dir), "--forget", str(forget), "--out", str(tmp_path / "run")]
    assert run(*train, "--set", "alpha=0", "--set", "max_steps=1", "--quiet") == 0
    gc.collect()  # the command ran in this process, which reads as long as the trainer lives
    capsys.readouterr()
    assert run("cache", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    (entry,) = listed["entries"]
    assert listed["directory"] == str(root) and listed["limit_bytes"] == 20e9
    assert (entry["what"], entry["model"]) == ("losses", str(model_dir))
    assert entry["data"] == f"3 forget rows of {forget}"
    assert entry["bytes"] == sum(path.stat().st_size for path in (root / "reference").iterdir())
    assert not entry["removed"]
    assert run("cache", "--older-than", "1", "--clear") == 0
    assert f"nothing to remove in {root}" in capsys.readouterr().out
    for path in (root / "reference").iterdir():
        os.utime(path, (1e9, 1e9))
    assert run("cache") == 0
    shown = capsys.readouterr().out
    assert "losses" in shown and "2001-09-0" in shown and "limited to 20 GB together" in shown
    with Path(entry["path"]).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run("cache", "--clear") == 0
        assert "1 in use and kept" in capsys.readouterr().out
    assert run("cache", "--clear", "--older-than", "30") == 0
    assert "removed 1 entry, " in capsys.readouterr().out
    assert list((root / "reference").iterdir()) == []


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cache", "--older-than", "-1") == 2
    assert "--older-than must be at least 0, got -1.0" in capsys.readouterr().err
    monkeypatch.setenv("UNLEARNING_CACHE_GB", "many")
    assert run("cache") == 2
    assert capsys.readouterr().err.count("\n") == 1
