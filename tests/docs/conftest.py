"""The directory that the code blocks of README and docs run in."""

import json
from pathlib import Path

import pytest

from dissect.zoo import question_set, resolve
from unlearning.data.records import read_records


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with what a reader has: ./base, ./npo, ./control, forget.json and retain.json."""
    path = tmp_path_factory.mktemp("docs")
    for name, built_in in (("base", "demo:base"), ("npo", "demo:npo"), ("control", "demo:never")):
        (path / name).symlink_to(resolve(built_in), target_is_directory=True)
    for name in ("forget", "retain"):
        (path / f"{name}.json").write_text(json.dumps(read_records(question_set(name))), encoding="utf-8")
    return path
