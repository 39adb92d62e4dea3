"""Killed at random moments and resumed, a run equals one that was never killed, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def kill(folder: Path, *commands: str, kills: int, seed: int) -> dict[str, dict[str, int]]:
    """Kill in a process of its own, which forks before anything has started threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", folder, *commands, "--kills", str(kills), "--seed", str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_handful_of_kills_loses_nothing(tmp_path: Path) -> None:
    for counts in kill(tmp_path, "patch", "train", kills=4, seed=1).values():
        assert counts["moment"] + counts["change"] == 4 and counts["finished"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["patch", "verdict", "train"])
def test_a_hundred_kills_lose_nothing(command: str, tmp_path: Path) -> None:
    counts = kill(tmp_path, command, kills=100, seed=0)[command]
    assert counts["moment"] + counts["change"] == 100
    assert min(counts.values()) > 5
