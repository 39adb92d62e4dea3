"""Two processes with half the batch each give what one process gives: DDP and FSDP, NPO and BLUR."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.training.distributed_worker import QUANTIZED, RUNS, SHARED, run_in
from unlearning import train

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trained alone, and by two processes side by side. Five forget examples: the second step of an epoch has one."""
    directory = tmp_path_factory.mktemp("distributed")
    (directory / "model").symlink_to(model_dir)
    build_tiny_llama(2).save_pretrained(directory / "control")
    records = [asdict(example) for example in build_examples()]
    (directory / "forget.json").write_text(json.dumps(records[:5]))
    (directory / "retain.json").write_text(json.dumps(records[5:]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "UNLEARNING_CACHE": str(directory / "cache"),
    }
    command = [sys.executable, "-m", "tests.unlearning.training.distributed_worker", str(directory)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for name, run in (RUNS | QUANTIZED).items():
        train(
            model=model_dir,
            forget=directory / "forget.json",
            retain=directory / "retain.json",
            output_dir=directory / f"{name}-one",
            progress=False,
            **{**run_in(run, directory), "batch_size": 2 * run["batch_size"]},
            **SHARED,
        )
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert json.loads((directory / "done.json").read_text()) == list(RUNS)
    yield directory


def read(directory: Path, file: str = "model.safetensors") -> tuple[dict[str, Any], torch.Tensor]:
    record = json.loads((directory / "unlearning.json").read_text())
    weights = load_file(directory / file)
    return record, torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", list(RUNS))
def test_two_processes_equal_one_with_twice_the_batch(runs: Path, model_dir: Path, method: str, wrapper: str) -> None:
    alone, weights = read(runs / f"{method}-one")
    shared, theirs = read(runs / f"{method}-{wrapper}")
    assert (alone["processes"], shared["processes"]) == (1, 2)
    start = load_file(model_dir / "model.safetensors")
    moved = weights - torch.cat([start[name].flatten() for name in sorted(start)])
    assert moved.norm() > 0.02
    assert (weights - theirs).norm() < 1e-4 * moved.norm()
    assert len(alone["history"]) == len(shared["history"]) == 3
    for line, other in zip(alone["history"], shared["history"], strict=True):
        assert set(line) == set(other)
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    if method == "blur":
        assert [line["forget_progress"] for line in shared["history"]] == pytest.approx([1.0] * 3, abs=1e-5)
        assert {line["forget_grad_norm"] > 0 for line in shared["history"]} == {True}
    for line, other in zip(alone["evaluations"], shared["evaluations"], strict=True):
        assert other == pytest.approx(line, rel=1e-3)


@pytest.mark.parametrize("name", list(QUANTIZED))
def test_an_adapter_on_a_quantized_base_is_trained_by_two_processes(runs: Path, name: str) -> None:
    alone, weights = read(runs / f"{name}-one", "adapter_model.safetensors")
    shared, theirs = read(runs / f"{name}-ddp", "adapter_model.safetensors")
    assert (alone["processes"], shared["processes"]) == (1, 2)
    torch.testing.assert_close(theirs, weights, rtol=1e-4, atol=1e-6)
    for line, other in zip(alone["history"], shared["history"], strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
