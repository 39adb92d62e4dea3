"""`python -m benchmarks.memory`: what it measures from outside, what it reports, what it refuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.child import peak_resident_bytes
from benchmarks.memory import main
from benchmarks.pair_files import tensor_sizes
from benchmarks.shapes import SHAPES
from tests.benchmarks.helpers import assert_refused
from tests.command_lines import call_main

MIB = 2**20


def peak_of(code: str) -> int:
    """The mark of a Python that runs this and then waits for its stdin to close."""
    command = [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        peak = peak_resident_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.close()
    return peak


def test_the_peak_is_the_childs_highest_and_not_its_parents() -> None:
    assert psutil.Process(os.getpid()).memory_info().rss > 150 * MIB, "a parent with torch in it"
    assert peak_of("pass") < 60 * MIB
    assert 140 * MIB < peak_of("b = bytearray(b'1') * (140 * 2**20); del b") < 220 * MIB


def test_a_process_that_is_gone_has_no_peak() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert peak_resident_bytes(child.pid) == 0


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_report_of_a_tiny_pair(stream: bool, tmp_path: Path) -> None:
    started = time.time()
    command = ["--shape", "tiny", "--disk", tmp_path, "--json", "-", "--window", "3", *(["--stream"] * stream)]
    outcome = call_main(main, *command)
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    run = json.loads((tmp_path / "tiny" / "run" / "run.json").read_text())
    assert run["status"] == "complete" and run["configuration"]["examples"] == 2
    assert run["configuration"]["windows"] == ["3"]
    assert record["sweep_seconds"] == run["wall_time_s"] < record["process_seconds"] < time.time() - started
    assert 100 * MIB < record["peak_resident_bytes"] < 4096 * MIB
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("tiny/*/*.safetensors"))
    assert record["weight_bytes_of_both"] == on_disk
    matrices, norms = n_bytes(matrices=True), n_bytes(matrices=False)
    least, most = (2 * matrices + norms, 2 * (matrices + norms)) if stream else (0, 0)
    assert least <= record["bytes_read"] <= most, "each tensor once, and once for both where both have it"
    assert record["planned_flops"] == run["plan"]["flops"] < 0.6 * record["naive_flops"]
    rate = record["planned_flops"] / record["sweep_seconds"]
    assert record["gemm_share"] == pytest.approx(rate / record["gemm_peak_flops_per_second"])
    assert ("times both models" if stream else "loaded whole") in outcome.err


def n_bytes(*, matrices: bool) -> int:
    """Of one tiny model: of its matrices, which differ between the two, or of its norms, which do not."""
    return sum(2 * size.numel() for size in tensor_sizes(SHAPES["tiny"]).values() if (len(size) > 1) == matrices)


@pytest.mark.slow
def test_remove_leaves_nothing(tmp_path: Path) -> None:
    outcome = call_main(main, "--shape", "tiny", "--disk", tmp_path, "--remove", "--window", "9")
    assert_refused(outcome, "dissect patch exited with 2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--shape", "70b"], ["--shape 70b: unknown; there are 7b, 1b"]),
        (["--shape", "tiny", "--answer", "24"], ["--tokens 24 --answer 24", "more tokens than the answer's"]),
        (["--shape", "tiny", "--prompts", "0"], ["--prompts 0"]),
        (["--shape", "tiny", "--threads", "-1"], ["--threads -1: at least 1"]),
        (["--shape", "tiny", "--json", "/proc/none/x"], ["--json /proc/none/x: cannot be written"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call_main(main, *arguments), *phrases)
