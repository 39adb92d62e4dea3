"""`python -m benchmarks.sweep`: table, JSON, and what it refuses."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.account import KINDS
from benchmarks.case import paper_sweeps
from benchmarks.contestants import notebook
from benchmarks.shapes import find_shape
from benchmarks.sweep import main
from tests.benchmarks.helpers import assert_refused
from tests.command_lines import Outcome, call_main

IN_PROCESS = "notebook,transformer_lens,reference"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Any]]:
    """A quick run with everything but nnsight, and its JSON."""
    path = tmp_path_factory.mktemp("sweep") / "quick.json"
    outcome = call_main(main, "--quick", "--against", IN_PROCESS, "--json", path)
    assert outcome.code == 0, outcome.err
    return outcome, json.loads(path.read_text(encoding="utf-8"))


def test_table_has_a_line_for_every_contestant(quick: tuple[Outcome, dict[str, Any]]) -> None:
    outcome, record = quick
    for name in ("wavefront", *IN_PROCESS.split(",")):
        (line,) = [line for line in outcome.out.splitlines() if line.strip().startswith(name)]
        assert f"{record['contestants'][name]['ratio_to_ours']:.2f}" in line.split()
    assert "KRS agree to" in outcome.out
    assert "…" not in outcome.out, "a number is cut"


def test_json_holds_ratios_shares_operations_and_memory(quick: tuple[Outcome, dict[str, Any]]) -> None:
    _, record = quick
    ours = record["contestants"]["wavefront"]
    assert (record["shape"], record["repeats"], record["dtype"], record["interventions"]) == ("tiny", 1, "float32", 24)
    assert record["agreement"]["max_krs_difference"] < 1e-4
    assert record["not_installed"] == {}
    for name, entry in record["contestants"].items():
        assert entry["ratio_to_ours"] == pytest.approx(entry["seconds"] / ours["seconds"])
        assert len(entry["all_seconds"]) == 1 and entry["warm_up_seconds"] > 0
        share = entry["flops"] / entry["seconds"] / entry["gemm_peaks_around"][0]
        assert entry["gemm_share"] == pytest.approx(share)
        assert entry["peak_memory_bytes_above_start"] >= 0
        if name != "wavefront":
            assert entry["flops"] == record["naive_flops"]
    assert record["versions"]["torch"].startswith("2.")


@pytest.mark.slow
def test_json_on_stdout_leaves_the_table_to_stderr() -> None:
    outcome = call_main(main, "--quick", "--against", "notebook", "--json", "-")
    assert outcome.code == 0
    assert set(json.loads(outcome.out)["contestants"]) == {"wavefront", "notebook"}
    assert "notebook" in outcome.err


@pytest.mark.slow
def test_a_contestant_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nnsight" else real(name, *rest)
    )
    outcome = call_main(main, "--quick", "--against", "nnsight,notebook", "--json", "-")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert set(record["contestants"]) == {"wavefront", "notebook"}
    assert record["not_installed"] == {"nnsight": "pip install -c constraints.txt nnsight"}
    assert "nnsight is not installed: pip install" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--against", "notebook,nnsite"], ["--against nnsite", "unknown contestant; there are wavefront"]),
        (["--shape", "huge"], ["--shape huge: unknown; there are compute, small, demo"]),
        (["--shape", "7b"], ["--shape 7b: unknown"]),
        (["--repeats", "2"], ["--repeats 2", "--quick"]),
        (["--quick", "--threads", "0"], ["--threads 0: at least 1"]),
        (["--quick", "--dtype", "bfloat16"], ["--dtype", "bfloat16", "CPU"]),
        (["--quick", "--device", "tpu9"], ["--device", "tpu9"]),
        (["--quick", "--json", "/proc/none/x.json", "--against", ""], ["/proc/none/x.json", "cannot be written"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call_main(main, *arguments), *phrases)


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_contestant_with_other_numbers_is_an_error(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = notebook.prepare

    def wrong(pair: Any, interventions: Any) -> Any:
        run = right(pair, interventions)
        return lambda batches: run(batches).index_add_(0, *_at(5, shift))

    monkeypatch.setattr(notebook, "prepare", wrong)
    assert_refused(
        call_main(main, "--quick", "--against", "notebook"), "wavefront and notebook differ by", "nothing is reported"
    )


def _at(row: int, shift: float) -> tuple[Any, Any]:
    """What `index_add_` takes to shift one intervention of the tiny shape."""
    import torch

    return torch.tensor([row]), torch.full((1, 3), shift, dtype=torch.float64)


@pytest.mark.slow
def test_the_account_adds_up_to_the_sweep_and_counts_what_the_plan_counts(tmp_path: Path) -> None:
    outcome = call_main(main, "--quick", "--against", "notebook", "--account", "--json", tmp_path / "a.json")
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    parts = {part["kind"]: part for part in record["account"]}
    assert list(parts) == list(KINDS)
    assert all(part["seconds"] > 0 for part in parts.values())
    planned, naive = (record["contestants"][name]["flops"] for name in ("wavefront", "notebook"))
    shape = find_shape("tiny", ["tiny"])
    one_example = naive / (2 + len(paper_sweeps(shape.n_layers))) / shape.prompts
    proofs = 3 * one_example  # of the blocks, and of base and target with all of the base's weights
    found = parts["products with weights"]["flops"]
    assert 0.9 * planned < found - proofs < planned  # attention scores are planned too
    assert all(part["flops"] == 0 for kind, part in parts.items() if kind != "products with weights")
    assert all(kind in outcome.out for kind in KINDS)


def test_an_account_of_a_gpu_is_refused() -> None:
    assert_refused(call_main(main, "--account", "--device", "cuda"), "--account --device cuda", "use --device cpu")
