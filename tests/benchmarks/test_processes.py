"""`python -m benchmarks.processes`: the same numbers from one process and from two."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.child import patch_command
from benchmarks.processes import largest_difference, main
from tests.benchmarks.helpers import assert_refused
from tests.command_lines import call_main
from unlearning.common.errors import InputError


def save_run(path: Path, krs: list[float | None], *, site: str = "mlp_coef") -> Path:
    rows = [
        {"target": "unlearned", "kind": "patch", "site": site, "centre": centre, "example": f"e{example}"}
        for centre in range(2)
        for example in range(2)
    ]
    path.mkdir()
    frame = pd.DataFrame(rows).assign(krs=pd.array(krs, dtype="Float64").to_numpy("float64", na_value=float("nan")))
    frame.to_parquet(path / "results.parquet")
    return path


def test_difference_is_the_largest_whatever_the_order_of_rows(tmp_path: Path) -> None:
    one = save_run(tmp_path / "one", [0.1, 0.2, 0.3, None])
    two = save_run(tmp_path / "two", [0.1, 0.25, 0.29, None])
    shuffled = pd.read_parquet(two / "results.parquet").iloc[[3, 1, 0, 2]]
    shuffled.to_parquet(two / "results.parquet")
    assert largest_difference(one, two) == pytest.approx(0.05)
    assert largest_difference(one, one) == 0


@pytest.mark.parametrize("other", [{"krs": [0.1, 0.2, 0.3, 0.4]}, {"krs": [0.1, 0.2, 0.3, None], "site": "attn_out"}])
def test_runs_of_other_rows_are_not_compared(other: dict[str, object], tmp_path: Path) -> None:
    one = save_run(tmp_path / "one", [0.1, 0.2, 0.3, None])
    two = save_run(tmp_path / "two", **other)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other interventions or examples"):
        largest_difference(one, two)


def test_several_processes_are_started_by_torchrun() -> None:
    plain = [sys.executable, "-m", "dissect", "patch", "--base", "b"]
    assert patch_command(["--base", "b"]) == plain
    several = patch_command(["--base", "b"], processes=3)
    assert several[-5:] == plain[1:] and several[several.index("--nproc_per_node") + 1] == "3"


@pytest.mark.slow
def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    outcome = call_main(main, "--shape", "tiny", "--repeats", "1", "--disk", tmp_path, "--json", "-")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["max_krs_difference"] < 1e-4
    (one,), (two,) = record["seconds"]["1"], record["seconds"]["2"]
    assert record["speedup"] == pytest.approx(one / two)


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--processes", "1"], ["--processes 1: at least 2"]),
        (["--repeats", "0"], ["--repeats 0: at least 1"]),
        (["--shape", "7b"], ["--shape 7b: unknown; there are compute, small, tiny, demo"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call_main(main, *arguments), *phrases)
