"""Check that a change of the code changed no number.

    python -m tests.same_numbers record runs/before        # at the commit before the change
    python -m tests.same_numbers compare runs/before       # at the commit after it

`record` dissects a built-in pair with each experiment and trains a model for two steps; `compare` does the same
again and compares every table and every weight bit for bit. Takes about a minute.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from dissect import zoo

EXPERIMENTS = ("patch", "restore", "decompose", "probe")
"""The commands of `dissect` whose `results.parquet` is compared."""

RENAMED = {
    ("decompose", "site"): {"mlp": "mlp_out", "attn": "attn_out"},
    ("probe", "prompts"): {"unrelated": "retain"},
}
"""New names of labels by experiment and column; an old name and its new one count as the same."""


def record(directory: Path) -> None:
    """Run every experiment and a short training into `directory`."""
    directory.mkdir(parents=True)
    pair = ["--base", "demo:base", "--unlearned", "demo:npo", "--limit", "12", "--quiet"]
    for experiment in EXPERIMENTS:
        _run("dissect", experiment, *pair, "--out", str(directory / experiment))
    training = ["--model", "demo:base", "--set", "max_steps=2", "--set", "learning_rate=1e-3", "--quiet"]
    data = ["--forget", str(zoo.question_set("forget")), "--retain", str(zoo.question_set("retain"))]
    _run("unlearning", "train", "npo", *training, *data, "--out", str(directory / "train"))


def differences(before: Path, after: Path) -> list[str]:
    """Return one line for each table column and each weight that differs; empty if nothing does."""
    found = []
    for experiment in EXPERIMENTS:
        for old_file in sorted((before / experiment).glob("*.parquet")):
            new_file = after / experiment / old_file.name
            name = f"{experiment}/{old_file.name}"
            if not new_file.is_file():
                found.append(f"{name}: missing")
                continue
            old_table = _with_new_names(experiment, pd.read_parquet(old_file))
            found += _table_differences(name, old_table, pd.read_parquet(new_file))
    old, new = (load_file(directory / "train" / "model.safetensors") for directory in (before, after))
    if old.keys() != new.keys():
        found.append(f"train: the tensors' names differ: {sorted(old.keys() ^ new.keys())}")
    found += [f"train: {key} differs" for key in sorted(old.keys() & new.keys()) if not torch.equal(old[key], new[key])]
    return found


def _with_new_names(experiment: str, table: pd.DataFrame) -> pd.DataFrame:
    renamed = {column: names for (of, column), names in RENAMED.items() if of == experiment and column in table}
    return table.replace(renamed)


def _table_differences(name: str, old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    if len(old) != len(new):
        return [f"{name}: {len(old)} rows before, {len(new)} after"]
    missing = [f"{name}: column {column} is gone" for column in old if column not in new]
    changed = [
        f"{name}: column {column} differs" for column in old if column in new and not old[column].equals(new[column])
    ]
    return missing + changed


_FIXED = """
import sys
from dissect.engine import plan
plan.measure_chunk = lambda *_: 256
from {package}.cli import main
sys.argv[0] = {package!r}
main()
"""
# The chunk is timed on the machine, and another chunk rounds otherwise; so it is fixed here.


def _run(package: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-c", _FIXED.format(package=package), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "record":
        record(arguments.directory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        record(Path(scratch) / "after")
        found = differences(arguments.directory, Path(scratch) / "after")
    sys.stdout.write("\n".join(found or ["every table and every weight is bit for bit the same"]) + "\n")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
