"""`python -m benchmarks.training`: both sides train the same, and what is said of them is what was measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_race
from benchmarks.training import main
from benchmarks.training_case import EOS, SHAPES, TrainingCase, mean_tokens
from benchmarks.training_options import METHODS, Method
from benchmarks.training_plain import train_plain
from benchmarks.training_race import step_times, train_ours
from tests.benchmarks.helpers import assert_refused
from tests.command_lines import Outcome, call_main
from unlearning.data.spans import encode_answer

CHOSEN = ["grad_diff", "blur"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Any]]:
    """A quick run, and its JSON."""
    path = tmp_path_factory.mktemp("training") / "quick.json"
    outcome = call_main(main, "--quick", "--methods", ",".join(CHOSEN), "--json", path)
    assert outcome.code == 0, outcome.err
    return outcome, json.loads(path.read_text(encoding="utf-8"))


def test_both_sides_have_the_same_losses_and_train(quick: tuple[Outcome, dict[str, Any]]) -> None:
    _, record = quick
    assert record["max_relative_loss_difference"] < 1e-4
    for name in CHOSEN:
        ours, plain = (record["methods"][name][side]["losses"] for side in ("ours", "plain"))
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-4)
        assert len(ours) == 3 and len(set(ours)) == 3


@pytest.mark.slow
def test_the_other_methods_agree_too_and_their_memory_is_set_against_finetune() -> None:
    outcome = call_main(main, "--quick", "--methods", "finetune,npo_nll,npo_kl", "--json", "-")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["max_relative_loss_difference"] < 1e-4
    start = record["methods"]["npo_kl"]["ours"]["losses"][0]
    assert start == pytest.approx(20 * math.log(2), rel=1e-4), "(2 / beta) ln 2, and KL 0"
    of_plain = record["methods"]["finetune"]["plain"]["peak_memory_bytes"]
    for found in record["methods"].values():
        assert found["memory_over_plain_finetune"] == found["ours"]["peak_memory_bytes"] / of_plain


def test_ratios_are_those_of_the_times_and_of_the_memory(quick: tuple[Outcome, dict[str, Any]]) -> None:
    outcome, record = quick
    found = record["methods"]
    for name in CHOSEN:
        ours, plain = found[name]["ours"], found[name]["plain"]
        assert found[name]["speedup"] == pytest.approx(plain["seconds_per_step"] / ours["seconds_per_step"])
        cpu = plain["all_cpu_seconds_per_step"][0] / ours["all_cpu_seconds_per_step"][0]
        assert found[name]["cpu_speedup"] == pytest.approx(cpu) and f"{name} {cpu:.2f}" in outcome.out
        assert found[name]["memory_over_plain_finetune"] is None, "fine-tuning was not run"
        assert ours["seconds_per_step"] > 0 and len(ours["all_seconds_per_step"]) == 1
        (line,) = [line for line in outcome.out.splitlines() if line.split()[:1] == [name]]
        assert f"{found[name]['speedup']:.2f}" in line.split()
    together = found["grad_diff"]["ours"]["seconds_per_step"] + record["projection_seconds"]
    ratio = found["blur"]["ours"]["seconds_per_step"] / together
    assert record["blur_over_grad_diff_plus_projection"] == pytest.approx(ratio)
    assert f"BLUR takes {ratio:.2f} of grad_diff's step plus" in outcome.out
    assert "…" not in outcome.out, "a number is cut"


@pytest.mark.parametrize("shift", [0.01, math.nan])
def test_another_loss_is_an_error(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(case: TrainingCase, method: Method) -> list[float]:
        first, *rest = train_plain(case, method)
        return [first, *(loss + shift for loss in rest)]

    monkeypatch.setattr(training_race, "train_ours", shifted)
    outcome = call_main(main, "--quick", "--methods", "grad_diff")
    assert_refused(outcome, "grad_diff: ours and the straightforward trainer differ", "step 2; nothing is reported")


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--shape", "huge"], ["--shape huge: unknown; there are wide, deep"]),
        (["--methods", "npo,finetune"], ["--methods npo: unknown; there are finetune, grad_diff"]),
        (["--methods", " , "], ["--methods: none are named"]),
        (["--repeats", "2"], ["--repeats 2", "--quick"]),
        (["--steps", "1"], ["--steps 1: at least 2"]),
        (["--quick", "--json", "/proc/none/x.json"], ["/proc/none/x.json", "cannot be written"]),
        (["--quick", "--device", "tpu9"], ["--device", "tpu9"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call_main(main, *arguments), *phrases)


def test_every_step_of_an_optimizer_is_stamped() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    with step_times(torch.device("cpu")) as stamps:
        for _ in range(3):
            optimizer.step()
    optimizer.step()
    assert len(stamps) == 3
    for moments in ([stamp.wall for stamp in stamps], [stamp.cpu for stamp in stamps]):
        assert moments == sorted(moments)


def test_the_toolkit_steps_once_a_step_batch() -> None:
    case = TrainingCase(SHAPES["tiny"], steps=3)
    with step_times(case.device) as stamps:
        losses = train_ours(case, METHODS["finetune"])
    assert len(stamps) == len(losses) == 3


def test_the_data_have_tofus_lengths_and_are_whole_in_the_step_batches() -> None:
    case = TrainingCase(SHAPES["deep"], steps=50)
    words = 12.4 + 26.9  # of forget10's questions and answers
    assert mean_tokens(case.forget) == pytest.approx(1.3 * words + 6 + 1, rel=0.05)
    step_batches = list(case.step_batches(uses_forget=True))
    assert len(step_batches) == 50 and all(len(forget) == len(retain) == 8 for forget, retain in step_batches)
    for place, data in ((0, case.forget), (1, case.retain)):
        read = [id(row) for step_batch in step_batches for row in step_batch[place]]
        assert len(set(read)) == len(read) == 400 and set(read) <= {id(row) for row in data}
    row = case.forget[0]
    span = encode_answer(case.tokenizer, row.example.prompt, row.example.answer, append_eos=True)
    assert span.input_ids == row.prompt + row.answer and span.answer_start == len(row.prompt)
    assert row.answer[-1] == EOS and EOS not in row.prompt + row.answer[:-1]


def test_the_start_model_is_the_same_every_time() -> None:
    case = TrainingCase(SHAPES["tiny"], steps=2)
    first, again = (case.build_model().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_finished_run_leaves_no_constants_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path))
    train_ours(TrainingCase(SHAPES["tiny"], steps=2), METHODS["npo_nll"])
    assert list(tmp_path.iterdir()) == []
