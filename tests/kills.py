"""Kill a command again and again, at random moments and before random changes of files, and resume it each time.

    python -m tests.kills DIRECTORY patch train verdict --kills 100 --seed 0

A run that was killed and resumed until it finished must equal, byte for byte, one that was never killed; wall times and
memory may differ. Models are loaded once; each attempt is a fork of that process, which starts within milliseconds.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

UNCOMPARED = {"training_args.bin", "trainer_state.json"}
"""Files of checkpoints that hold times of the day, or names of directories."""

_TIMES = re.compile(rb"\b\d+ s(econds)?\b|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
"""Times in texts, and the numbers that plotly draws for its figures."""

Act = Callable[[Path], object]

CHANGES = {"os.rename", "os.remove", "os.link", "os.rmdir", "os.mkdir", "open"}
"""Audit events of what changes files; of `open`, those that write."""

MAY_DIFFER = {
    *("wall_time_s", "seconds", "base_and_control_s", "started", "finished", "peak_memory_bytes"),
    *("bytes_held", "budget_bytes"),
}
"""Entries of JSON files that are times or memory. `finished` is a time in `run.json`, and always true elsewhere."""


def patch(folder: Path) -> Act:
    """A sweep of twelve batches."""
    from dissect.sweeps.patching import patch
    from tests.dissect.helpers import RECORDS, build_pair, build_prompts

    pair, prompts = build_pair("llama", scale=0.1), build_prompts(folder, RECORDS)
    return lambda out: patch(pair, prompts, window=1, batch_size=1, chunk_tokens=64, out=out, progress=False)


def verdict(folder: Path) -> Act:  # noqa: ARG001
    """A verdict of four cheap tests."""
    from functools import partial

    from dissect.models.pair import ModelPair
    from dissect.stress import catalogue
    from dissect.stress.catalogue import Entry
    from dissect.stress.lenses import logit_lens
    from dissect.stress.without_attack import without_attack
    from dissect.verdicts import run
    from tests.dissect.stress.constructed import model, questions
    from tests.dissect.verdicts.test_run import HARMLESS, RULE, harmless

    tests = {"without_attack": without_attack, "logit_lens": partial(logit_lens, layers=[3])}
    tests |= {name: partial(harmless, name) for name in HARMLESS}
    entries = tuple(
        Entry(name, dict.fromkeys(catalogue.BUDGETS, test), compares_models=name != "logit_lens")
        for name, test in tests.items()
    )
    catalogue.entries = lambda *_: entries
    catalogue.SAMPLE = run.SAMPLE = dict.fromkeys(catalogue.BUDGETS, 24)
    pair, forget = ModelPair(model("demo:base"), model("demo:npo")), questions("forget")
    never = model("demo:never")  # loaded here: torch's threads, which loading uses, do not survive a fork
    return lambda out: run.verdict(pair, forget, control=never, budget="quick", rule=RULE, progress=False, out=out)


def train(folder: Path) -> Act:
    """Eight steps of training with two checkpoints on the way."""
    from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
    from tests.unlearning.training.test_resume import SHARED
    from unlearning import train

    model = folder / "model"
    build_tiny_llama().save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    return lambda out: train("npo", model=model, output_dir=out, resume=True, **SHARED)


COMMANDS: dict[str, Callable[[Path], Act]] = {"patch": patch, "verdict": verdict, "train": train}


def attempt(act: Act, out: Path, *, after_s: float | None = None, before_change: int | None = None) -> int:
    """Run the command in a fork; kill it some time after its start, or before the n-th change of a file.

    Returns:
        How it ended: 0, or minus the signal's number.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.manual_seed(os.getpid())  # nothing may hang on it
            if before_change is not None:
                _die_before(before_change, out.parent)
            act(out)
            code = 0
        except BaseException:  # the parent tells of it
            traceback.print_exc()
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_before(number: int, folder: Path) -> None:
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or str(folder) not in str(arguments[0]):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        changes += 1
        if changes == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def content(out: Path) -> dict[str, bytes | str]:
    """Everything in a directory by path: bytes, and JSON without times and memory."""
    files: dict[str, bytes | str] = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_file() and file.name not in UNCOMPARED:
            text = file.read_bytes()
            if file.suffix in (".md", ".html"):
                text = _TIMES.sub(b"", text)
            files[name] = json.dumps(_without_times(json.loads(text))) if file.suffix == ".json" else text
    return files


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in MAY_DIFFER}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def differences(ours: dict[str, bytes | str], theirs: dict[str, bytes | str]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def main() -> None:
    """Kill each command as often as asked; print how often each way of killing hit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("commands", choices=COMMANDS, nargs="+")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    counts = {}
    for name in given.commands:
        folder = given.folder / name
        folder.mkdir()
        os.environ["UNLEARNING_CACHE"] = str(folder / "cache")  # other tests run beside this one
        counts[name] = kill(COMMANDS[name](folder), folder, n=given.kills, seed=given.seed)
    sys.stdout.write(json.dumps(counts) + "\n")


def kill(act: Act, folder: Path, *, n: int, seed: int) -> dict[str, int]:
    """Kill a command `n` times, in as many directories as it takes, and compare each that finishes.

    Args:
        act: Run the command into a directory.
        folder: Where the directories are.
        n: Number of kills that hit a living process.
        seed: Random seed of the moments.

    Returns:
        Number of kills at a moment and before a change of a file, and of finished runs.
    """
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    assert attempt(act, whole) == 0
    wanted = content(whole)
    draw = random.Random(seed)
    kills = {"moment": 0, "change": 0}
    finished, attempts, left, spent_s = 0, 0, n, 0.0
    while left or not finished:
        out = folder / str(attempts) / "run"
        out.parent.mkdir()
        code = -signal.SIGKILL
        while code != 0:
            said = f"seed {seed}, {kills}, {out}"
            attempts += 1
            way: dict[str, Any] = {}
            if left and draw.random() < 0.5:
                # Up to the longest time that an attempt took: a machine may be busy.
                way = {"after_s": draw.uniform(0, spent_s)} if spent_s else {}
            elif left:
                way = {"before_change": draw.randint(1, 60)}
            started = time.perf_counter()
            code = attempt(act, out, **way)
            spent_s = max(spent_s, time.perf_counter() - started)
            assert code in (0, -signal.SIGKILL), f"{said}: the command failed"
            if code != 0:
                kills["moment" if "after_s" in way else "change"] += 1
                left -= 1
        assert (found := differences(wanted, content(out))) == [], f"{said}: {found}"
        assert [path.name for path in out.parent.iterdir()] == ["run"], said
        finished += 1
        shutil.rmtree(out.parent)
    return kills | {"finished": finished}


if __name__ == "__main__":
    main()
