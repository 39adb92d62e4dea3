"""`dissect patch` under torchrun and accelerate: one run and one voice, and nothing lost when a process dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from pandas.testing import assert_frame_equal

from tests.dissect.cli.helpers import Outcome, World, build_records, call, unfinished_files, write_records
from unlearning.common.runs import Run

EXAMPLES = 64
RESUME_HINT = "rerun the same command to resume"


def launched(
    count: int, *command: str | Path, by: str = "torchrun", program: tuple[str, ...] = ("-m", "dissect")
) -> list[str]:
    """How a launcher starts so many processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port],
        "accelerate": [
            *["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"],
            *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port],
        ],
    }[by]
    return [sys.executable, "-m", *launcher, *program, *map(str, command), "--device", "cpu"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a launcher's end; of what it says, its own account of failed processes is left out."""
    out, err = process.communicate(timeout=120)
    ours = [line + "\n" for line in err.splitlines() if line.startswith("dissect: ")]
    return Outcome(process.returncode, out, "".join(ours))


def kill_one(launcher: subprocess.Popen[str], run: Path, *, rank: int) -> None:
    """Kill one process of a launch once some batches are kept."""
    deadline = time.monotonic() + 120
    while len(list(run.glob("parts/*.parquet"))) < 3:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, "no batch was kept in two minutes"
        time.sleep(0.002)
    (process,) = [one for one in psutil.Process(launcher.pid).children() if one.environ().get("RANK") == str(rank)]
    process.kill()


def assert_unfinished(run: Path) -> None:
    """Some parts, all of them whole, and nothing that claims to be complete."""
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert not (run / "results.parquet").exists()
    parts = list((run / "parts").glob("*.parquet"))
    assert 3 <= len(parts) < EXAMPLES
    assert sum(len(pd.read_parquet(part)) for part in parts) == 3 * len(parts)  # three windows of one example


def assert_same_numbers(run: Path, other: Path, *, processes: int) -> None:
    """The same rows in the same order, and KRS within 1e-4; written by so many processes, nothing left over."""
    ours, theirs = (pd.read_parquet(path / "results.parquet") for path in (run, other))
    assert_frame_equal(ours, theirs, check_exact=False, rtol=0, atol=1e-4)
    assert json.loads((run / "run.json").read_text())["processes"] == processes
    assert not (run / "parts").exists()
    assert unfinished_files(run) == []


@pytest.fixture(scope="module")
def many(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sweep of many short passes, without its `--out`."""
    data = write_records(tmp_path_factory.mktemp("data") / "many.jsonl", build_records(EXAMPLES))
    return world.patch(None, "--batch-size", "1", "--quiet", data=data)


@pytest.fixture(scope="module")
def many_finished(many: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That sweep, run by one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert call(*many, "--out", run, "--device", "cpu") == Outcome(0, "", "")
    return run


def test_two_processes_give_the_numbers_of_one_and_the_first_speaks(
    world: World, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    alone, _ = finished
    sites = "mlp_coef,attn_out,mlp_coef+attn_out"
    options = ["--control", str(world.control), "--window", "3", "--sites", sites, "--seed", "7", "--json"]
    outcome = finish(start(launched(2, *world.patch(tmp_path / "run", *options))))
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert told["run"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "figures" / "krs.html").is_file()
    assert_same_numbers(tmp_path / "run", alone, processes=2)


@pytest.mark.slow
def test_more_processes_than_examples_share_the_interventions(world: World, tmp_path: Path) -> None:
    assert call(*world.patch(tmp_path / "alone", "--quiet", "--limit", "2")).code == 0
    outcome = finish(start(launched(3, *world.patch(tmp_path / "run", "--quiet", "--limit", "2"))))
    assert outcome == Outcome(0, "", "")
    assert_same_numbers(tmp_path / "run", tmp_path / "alone", processes=3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["passes"] >= 3


def test_a_killed_process_ends_the_others_with_one_line_and_one_process_finishes_the_run(
    many: list[str], many_finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = start(launched(2, *many, "--out", run))
    kill_one(launcher, run, rank=0)
    outcome = finish(launcher)
    assert outcome.code == 1
    reason = "it was killed, by a user or because memory ran out"
    assert (outcome.out, outcome.err) == ("", f"dissect: process 0 stopped: {reason}; {RESUME_HINT}\n")
    assert_unfinished(run)
    assert call(*many, "--out", run, "--device", "cpu") == Outcome(0, "", "")
    assert_same_numbers(run, many_finished, processes=1)


LOSING = """
import os, time
from dissect.runtime.link import Stopped, joined_link
rank = int(os.environ["RANK"])
with joined_link(rank, 2) as link:
    if rank == 0:
        time.sleep(1)
        os._exit(1)
    try:
        time.sleep(60)
    except Stopped:  # lost, as one that is raised in a destructor is
        pass
    link.wait()
"""


@pytest.mark.slow
def test_a_lost_signal_is_sent_again(tmp_path: Path) -> None:
    program = tmp_path / "losing.py"
    program.write_text(LOSING)
    command = launched(2, program=(str(program),))
    process = start(command[:-2])  # without `--device`
    _, err = process.communicate(timeout=60)
    assert "process 0 stopped: it was killed" in err


@pytest.mark.slow
def test_accelerate_s_processes_finish_what_one_began(
    many: list[str], many_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    keep_part = Run.keep_part

    def keep_five(run: Run, name: str, frame: pd.DataFrame) -> None:
        if run.n_parts == 5:
            raise KeyboardInterrupt
        keep_part(run, name, frame)

    monkeypatch.setattr(Run, "keep_part", keep_five)
    assert call(*many, "--out", run, "--device", "cpu").code == 130
    assert_unfinished(run)
    assert finish(start(launched(2, *many, "--out", run, by="accelerate"))) == Outcome(0, "", "")
    assert_same_numbers(run, many_finished, processes=2)


LIMITED = """
import os, resource
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
from dissect.cli import main
main()
"""


@pytest.mark.slow
def test_an_error_in_one_process_is_told_once_and_ends_the_run(many: list[str], tmp_path: Path) -> None:
    program = tmp_path / "limited.py"
    program.write_text(LIMITED)
    run = tmp_path / "run"
    outcome = finish(start(launched(2, *many, "--out", run, program=(str(program),))))
    assert outcome.code != 0
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"dissect: process 1 stopped: {run / 'parts'}/")
    assert line.endswith(f"File too large; {RESUME_HINT}")
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert unfinished_files(run) == []


@pytest.mark.slow
def test_bad_input_is_told_once(world: World, finished: tuple[Path, Outcome]) -> None:
    outcome = finish(start(launched(2, *world.patch(finished[0], "--seed", "8"))))
    assert outcome.code != 0
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"dissect: {finished[0]} holds another run: ")
