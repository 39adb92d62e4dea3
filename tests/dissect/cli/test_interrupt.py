"""Ctrl-C and kill -9 in the middle of a sweep: whole files only, and the same command again finishes the run.

Each kind of end is a real signal to a real process; only what comes after it runs in this process.
"""

import json
import os
import platform
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from tests.dissect.cli.helpers import World, build_records, call, unfinished_files, write_records
from tests.other_process import other_process
from unlearning.common.runs import Run

BATCHES = 32


@pytest.fixture(scope="module")
def command(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sweep of many short batches, without its `--out`."""
    data = write_records(tmp_path_factory.mktemp("data") / "many.jsonl", build_records(2 * BATCHES))
    return world.patch(None, "--batch-size", "2", "--device", "cpu", "--quiet", data=data)


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert call(*command, "--out", run).code == 0
    return run


def stopped(command: list[str], run: Path, number: signal.Signals) -> tuple[int, str, str]:
    """Start the command, send it the signal once some batches are kept, and say how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dissect", *command, "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list(run.glob("parts/*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no batch was kept in two minutes"
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def assert_whole_and_unfinished(run: Path) -> int:
    """Every file can be read, nothing claims to be complete; how many batches were kept."""
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert not (run / "results.parquet").exists()
    assert not (run / "summary.json").exists()
    parts = sorted((run / "parts").glob("*.parquet"))
    assert 3 <= len(parts) < BATCHES
    for number, part in enumerate(parts):
        assert part.name.startswith(f"main-{2 * number:05d}-")
        assert len(pd.read_parquet(part)) == 2 * 3  # examples, windows
    return len(parts)


def assert_same_run(run: Path, other: Path) -> None:
    """Two finished runs with the same table and the same summary, and nothing left over."""
    assert_frame_equal(
        pd.read_parquet(run / "results.parquet"), pd.read_parquet(other / "results.parquet"), check_exact=True
    )
    assert json.loads((run / "summary.json").read_text()) == json.loads((other / "summary.json").read_text())
    assert not (run / "parts").exists()
    assert unfinished_files(run) == []


def test_ctrl_c_keeps_whole_batches_and_the_same_command_finishes_the_run(
    command: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    code, out, err = stopped(command, run, signal.SIGINT)
    assert (code, out) == (130, "")
    assert err.startswith("dissect: interrupted; ") and err.count("\n") == 1
    assert unfinished_files(run) == []
    kept = assert_whole_and_unfinished(run)
    spent = json.loads((run / "run.json").read_text())["wall_time_s"]
    assert spent > 0
    refused = call("plot", run)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "the run is not finished" in refused.err

    from dissect.engine import wavefront

    swept = []
    sweep = wavefront.sweep

    def counted(*arguments: object) -> object:
        swept.append(1)
        return sweep(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wavefront, "sweep", counted)
    assert call(*command, "--out", run).code == 0
    assert len(swept) == BATCHES - kept
    assert_same_run(run, uninterrupted)
    assert json.loads((run / "run.json").read_text())["wall_time_s"] > spent


def test_kill_keeps_whole_batches_and_the_same_command_finishes_the_run(
    command: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = stopped(command, run, signal.SIGKILL)
    assert (code, out, err) == (-signal.SIGKILL, "", "")
    assert_whole_and_unfinished(run)
    assert call(*command, "--out", run).code == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_a_closed_terminal_keeps_whole_batches_and_frees_the_run(
    command: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        shown = [argument for argument in command if argument != "--quiet"]  # its progress bar goes nowhere
        os.execve(
            sys.executable,
            [sys.executable, "-m", "dissect", *shown, "--out", str(run)],
            {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        )
    deadline = time.monotonic() + 120
    while len(list(run.glob("parts/*.parquet"))) < 3:
        assert time.monotonic() < deadline, "no batch was kept in two minutes"
        while select.select([terminal], [], [], 0.002)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (128 + signal.SIGHUP, 120)  # 120: Python cannot flush its streams
    assert unfinished_files(run) == [] and not (run / ".lock").exists()
    assert_whole_and_unfinished(run)
    assert call(*command, "--out", run).code == 0
    assert_same_run(run, uninterrupted)


def test_a_run_that_another_process_writes_is_refused_with_who_holds_it(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with other_process(Run(run, {}).hold) as child:
        refused = call(*command, "--out", run)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert f"{run} is being written by process {child} on {platform.node()}, since 20" in refused.err
    assert call(*command, "--out", run).code == 0  # its lock is left, and it is dead
    assert not (run / ".lock").exists()


def test_a_model_that_changed_under_its_path_is_noticed(world: World, tmp_path: Path) -> None:
    """Also where a copy kept the time and the size of the file."""
    model, run = tmp_path / "unlearned", tmp_path / "run"
    shutil.copytree(world.unlearned, model)
    arguments = world.patch(run)
    arguments[arguments.index(str(world.unlearned))] = str(model)
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("dissect.engine.wavefront.sweep", stop)
        assert call(*arguments).code == 130
    (file,) = model.glob("*.safetensors")
    before = file.stat()
    file.write_bytes((world.control / file.name).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    refused = call(*arguments)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "holds another run: its hash of unlearned is" in refused.err


def test_unfinished_run_refuses_another_command(command: list[str], tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("dissect.engine.wavefront.sweep", stop)
        interrupted = call(*world.patch(run))
    assert interrupted.code == 130
    assert interrupted.err.startswith("dissect: interrupted; ")
    assert interrupted.err.count("\n") == 1
    other = call(*command, "--out", run)
    assert other.code == 2
    assert "holds another run" in other.err
    assert "its examples is 6, not 64" in other.err
