"""Processes that share a run: parts of the work, what they tell each other, and how one learns that another died."""

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
from hypothesis import given
from hypothesis import strategies as st

from dissect import load_pair, restore
from dissect.runtime.link import KILLED, MAX_MISSED, Peer
from dissect.runtime.processes import ALONE, Processes, join_processes, processes_on_machine
from tests.dissect.helpers import build_pair, build_prompts
from unlearning.common.errors import InputError

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@given(costs=st.lists(st.integers(1, 100), max_size=40), count=st.integers(1, 7))
def test_shares_hold_every_item_once_in_order_and_cost_about_the_same(costs: list[int], count: int) -> None:
    items = list(enumerate(costs))
    shares = [Processes(rank, count).share(items, lambda item: item[1]) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(cost for _, cost in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_one_process_alone_keeps_what_it_has() -> None:
    assert ALONE.share(["c", "a", "b"], len) == ["c", "a", "b"]
    assert ALONE.gather([1, 2]) == [1, 2]
    assert ALONE.once(lambda: "made") == "made"
    ALONE.wait()


def test_a_command_that_no_launcher_started_is_alone_and_loads_nothing() -> None:
    script = (
        "import sys\n"
        "from dissect.runtime.processes import ALONE, join_processes\n"
        "with join_processes() as processes:\n"
        "    assert processes is ALONE\n"
        "assert not {'torch', 'psutil', 'dissect.runtime.link'} & set(sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize(
    ("environment", "phrases"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "two", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK", "None", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK", "WORLD_SIZE=2", "got 2"]),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, ["RANK", "WORLD_SIZE=2", "got -1"]),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ["process 1 cannot join the 1 others", "MASTER_ADDR", "unset WORLD_SIZE"]),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
            ["process 1 cannot join the 1 others", "port"],
        ),
    ],
)
def test_a_broken_launch_is_refused_in_one_line(
    environment: dict[str, str], phrases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refused, join_processes(device="cpu"):
        pass
    assert "\n" not in str(refused.value)
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_neighbours_are_the_processes_of_this_machine_or_else_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    assert processes_on_machine() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert processes_on_machine() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_on_machine() == 4


def test_a_process_of_this_machine_is_dead_when_it_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    peer = Peer(rank=3, process=psutil.Process(child.pid))
    assert peer.failure is None
    child.kill()
    deadline = time.monotonic() + 10
    while peer.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert peer.failure == KILLED  # a zombie, whose parent has not asked for it yet
    child.wait()
    assert peer.failure == KILLED


def test_a_process_of_another_machine_is_dead_after_a_minute_of_silence() -> None:
    peer = Peer(rank=3, process=None)
    for beat in range(5):
        peer.update(str(beat).encode())
        assert peer.missed == 0
    for _ in range(MAX_MISSED - 1):
        peer.update(b"4")
    assert peer.failure is None
    peer.update(b"4")
    assert peer.failure is not None
    assert "60 seconds" in peer.failure
    peer.update(b"5")
    assert peer.failure is None


def launch(script: str, count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """So many processes that run the same script, started by hand: the first holds the store then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


TALK = """
import json, sys, time
from dissect.runtime.processes import join_processes
with join_processes(device="cpu") as processes:
    time.sleep(0.3 * (2 - processes.rank))
    told = {
        "gathered": processes.gather(["a"] * processes.rank),
        "once": processes.once(lambda: {"made by": processes.rank}),
    }
    sys.stdout.write(json.dumps(told))
"""


def test_processes_gather_in_the_order_of_their_ranks_and_the_first_tells_the_others() -> None:
    for process in launch(TALK, 3):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert json.loads(out) == {"gathered": ["a", "a", "a"], "once": {"made by": 0}}


LOSE = """
import os, signal, sys, time
from dissect.runtime.processes import join_processes
from unlearning.common.errors import InputError
try:
    with join_processes(device="cpu") as processes:
        processes.wait()
        if processes.rank == 1:
            {end}
        {meanwhile}
except InputError as error:
    sys.stdout.write(str(error))
"""


@pytest.mark.parametrize(
    ("end", "meanwhile", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "processes.wait()", KILLED),
        ("raise InputError('the disk is full')", "time.sleep(300)", "the disk is full"),
    ],
)
def test_who_waits_and_who_computes_stop_with_the_reason_of_the_one_that_died(
    end: str, meanwhile: str, reason: str
) -> None:
    start = time.monotonic()
    first, second = launch(LOSE.replace("{end}", end).replace("{meanwhile}", meanwhile), 2)
    out, err = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (out, err) == (f"process 1 stopped: {reason}; rerun the same command to resume", "")
    assert time.monotonic() - start < 40


SHARE = """
import os, sys
from pathlib import Path
from dissect import load_pair, restore
from dissect.runtime.processes import join_processes
from tests.dissect.helpers import build_prompts
folder = Path(sys.argv[1])
with join_processes(device="cpu") as processes:
    pair = load_pair(str(folder / "base"), str(folder / "unlearned"))
    mine = folder / f"prompts {processes.rank}"
    mine.mkdir()
    found = restore(
        pair, build_prompts(mine), sites="value_vectors+mlp_coef,embed", window=["prefix", 1], null=1, control=None,
        donor=str(folder / "base"), batch_size=1, chunk_tokens=60, out=folder / "run", progress=False,
        processes=processes,
    )
    found.frame.to_parquet(folder / f"table {processes.rank}.parquet")
"""


@pytest.mark.slow
def test_processes_share_the_arms_of_a_restoration_and_each_has_the_whole_table(tmp_path: Path) -> None:
    pair = build_pair("gpt2")
    for model in (pair.base, pair.unlearned):
        model.hf.save_pretrained(tmp_path / model.name)
        pair.tokenizer.save_pretrained(tmp_path / model.name)
    for process in launch(SHARE, 2, str(tmp_path)):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, ""), err
    found = [pd.read_parquet(tmp_path / f"table {rank}.parquet") for rank in range(2)]
    pd.testing.assert_frame_equal(*found, check_exact=True)
    (folder := tmp_path / "alone").mkdir()
    alone = restore(
        load_pair(str(tmp_path / "base"), str(tmp_path / "unlearned")),
        build_prompts(folder),
        sites="value_vectors+mlp_coef,embed",
        window=["prefix", 1],
        null=1,
        control=None,
        donor=str(tmp_path / "base"),
        batch_size=1,
        chunk_tokens=60,
        progress=False,
    )
    assert alone.arms == ["main", "null-0", "donor"]
    pd.testing.assert_frame_equal(found[0], alone.frame, rtol=1e-4, atol=1e-5)
