"""The cache: what is in it is known and can be removed, except what is in use and what belongs to others."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from tests.other_process import other_process
from unlearning import InputError
from unlearning.common import cache as cache_module
from unlearning.common.cache import cache_limit, created, hold, list_cache, make_room, older_than

KEYS = ["a" * 32, "b" * 32, "c" * 32]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNLEARNING_CACHE_GB", "3e-7")  # 300 bytes
    return tmp_path / "cache"


def add_file(root: Path, key: str, size: int, used: float) -> Path:
    path = root / "reference" / f"{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0" * size)
    os.utime(path, (used, used))
    return path


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "reference").iterdir())


def test_room_is_made_by_what_is_longest_unused(root: Path) -> None:
    for key, used in zip(KEYS, (3e9, 1e9, 2e9), strict=True):
        add_file(root, key, 100, used)
    make_room(0)
    assert len(left(root)) == 3  # 300 bytes fit
    make_room(50)
    assert left(root) == [f"{KEYS[0]}.npy", f"{KEYS[2]}.npy"]
    make_room(1000)  # more than fits at all
    assert left(root) == []
    make_room(1000)


def test_what_another_process_reads_stays(root: Path) -> None:
    read, other = add_file(root, KEYS[0], 200, 1e9), add_file(root, KEYS[1], 200, 2e9)
    descriptor = os.open(read, os.O_RDONLY)
    with other_process(lambda: hold(descriptor)):
        os.close(descriptor)
        (in_use,) = [entry for entry in list_cache() if entry.in_use]
        assert in_use.path == read and not in_use.remove()
        make_room(100)
        assert read.exists() and not other.exists()
    make_room(300)
    assert not read.exists()


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_not(root: Path) -> None:
    dead, living = (
        add_file(root, key, 10, 1e9).rename(root / "reference" / f".{key}.npy.partial-1") for key in KEYS[:2]
    )
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make_room(0)
        assert left(root) == [living.name]
    assert [entry.what for entry in list_cache()] == ["unfinished outputs of a model"]
    assert not dead.exists()


def test_a_file_that_was_taken_for_a_leftover_before_it_was_locked_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add_file(root, KEYS[0], 10, 1e9).rename(root / "reference" / f".{KEYS[0]}.npy.partial-1")
    lock, others = cache_module._locked, iter([lambda: make_room(0), path.unlink])

    def late(descriptor: int, operation: int) -> bool:
        if operation == fcntl.LOCK_EX:  # not those of `make_room`, which do not wait
            next(others, lambda: None)()
        return lock(descriptor, operation)

    monkeypatch.setattr(cache_module, "_locked", late)
    with created(path) as file:
        file.write(b"whole")
        make_room(0)
    assert next(others, None) is None and path.read_bytes() == b"whole"


def test_all_kinds_are_listed_with_what_is_known_of_them(root: Path) -> None:
    file = add_file(root, KEYS[0], 100, 1e9)
    file.with_suffix(".json").write_text(json.dumps({"what": "logits", "model": "./base", "data": "8 retain rows"}))
    evaluation, model = root / "evaluation" / KEYS[1], root / "models" / "demo" / "abc" / "npo"
    for directory, name, content in (
        (
            evaluation,
            "run.json",
            {"model": "demo:never", "configuration": {"command": "unlearn eval tofu", "split": "x"}},
        ),
        (model, "unlearning.json", {}),
    ):
        directory.mkdir(parents=True)
        (directory / name).write_text(json.dumps(content))
        (directory / "more").write_bytes(b"0" * 1000)
    known = {entry.kind: entry for entry in list_cache()}
    assert [(known[k].what, known[k].model, known[k].data) for k in ("reference", "evaluation", "models")] == [
        ("logits", "./base", "8 retain rows"),
        ("eval tofu", "demo:never", "x"),
        ("built-in model", "demo:npo", ""),
    ]
    assert known["evaluation"].size == 1000 + (evaluation / "run.json").stat().st_size
    assert [entry.kind for entry in older_than(list_cache(), 1)] == ["reference"]
    for held in (evaluation / ".lock", model.parent / ".npo.lock"):
        held.touch()
    assert sorted(entry.kind for entry in list_cache() if not entry.remove()) == ["evaluation", "models"]
    for held in (evaluation / ".lock", model.parent / ".npo.lock"):
        held.unlink()
    assert all(entry.remove() for entry in list_cache()) and not list_cache()
    assert sorted(path.name for path in root.rglob("*")) == ["evaluation", "models", "reference"]


def test_files_of_others_in_the_same_place_are_left_alone(root: Path) -> None:
    """`UNLEARNING_CACHE=/data`, where /data/models holds somebody's models."""
    others = ["models/llama/v1/config.json", "evaluation/mine/run.json", "reference/weights.npy", f"models/{KEYS[0]}"]
    for name in others:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert list_cache() == []
    make_room(10**6)
    assert all((root / name).is_file() for name in others)


def test_a_missing_cache_is_empty_and_a_broken_description_no_obstacle(root: Path) -> None:
    assert list_cache() == []
    make_room(10)
    assert not root.exists()
    file = add_file(root, KEYS[0], 100, 1e9)
    for broken in ("", "[]", "{", "[" * 100_000):
        file.with_suffix(".json").write_text(broken)
        assert [(entry.what, entry.model) for entry in list_cache()] == [("outputs of a model", "")]


def test_what_may_not_be_removed_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = add_file(root, KEYS[0], 400, 1e9)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(InputError, match=f"^{file}: cannot be removed: Permission denied"):
        list_cache()[0].remove()
    make_room(100)  # which training survives
    assert file.exists()


@pytest.mark.parametrize("text", ["many", "-1", "nan", "1 GB"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE_GB", text)
    with pytest.raises(InputError, match=f"UNLEARNING_CACHE_GB must be a number of GB, at least 0, got '{text}'"):
        cache_limit()
    monkeypatch.setenv("UNLEARNING_CACHE_GB", " 2.5 ")
    assert cache_limit() == 2.5e9
    monkeypatch.setenv("UNLEARNING_CACHE_GB", "")
    assert cache_limit() == 20e9
