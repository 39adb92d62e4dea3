"""A benchmark that is measured while a model trains: what it says, what it decides, and that it changes nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.analyses.helpers import needs_tofu, real_tofu
from tests.unlearning.evaluation.benchmarks.muse.muse_world import build_long_llama, muse_parts, write_hub
from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import InputError, train
from unlearning.checkpoints.load import load_tokenizer
from unlearning.data.chat import ChatFormat
from unlearning.data.question_answer import Wrapping
from unlearning.evaluation import during_training
from unlearning.evaluation.during_training import Prepare, Reading, evenly_spaced
from unlearning.evaluation.harness import Benchmark, Part, Row
from unlearning.evaluation.statistics import Metric, Resampled, Sample
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import encode_target, score_tokens

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
    "benchmark": "asked:forget",
    "eval_every": 2,
}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(during_training.BENCHMARKS, "asked", read_asked)


def read_asked(part: str, reading: Reading) -> Prepare:
    """Mean NLL of the first forget answers, and how far it is from the control's."""
    examples = evenly_spaced(FORGET if part == "forget" else RETAIN, reading.rows)

    def prepare(subject: Subject) -> Benchmark:
        chat: ChatFormat | None = reading.wrapping.chat
        targets = [encode_target(subject, e.prompt, e.answer, chat=chat) for e in examples]

        def score(places: Sequence[int]) -> list[Row]:
            found = score_tokens(subject, [targets[place] for place in places], batch_size=len(places))
            return [{"nll": scores.without_closing().mean_nll} for scores in found]

        return Benchmark("asked", {"part": part}, [Part(part, [1] * len(targets), score)], summarise)

    return prepare


def summarise(rows: pd.DataFrame, control_rows: pd.DataFrame | None) -> list[Metric]:
    mean = Sample("rows", [""] * len(rows)).mean(rows["nll"])
    gap = None
    if control_rows is not None:
        value = float(rows["nll"].mean() - control_rows["nll"].mean())
        gap = Resampled(value, np.full(5, value), len(rows))
    return [
        Metric("nll", mean, "higher is better", "mean NLL"),
        Metric("gap", gap, "closer to 0 is better", "to the control", None if gap else "no control"),
        Metric("minus_nll", Resampled(-mean.value, -mean.draws, mean.n), "lower is better", "-mean NLL"),  # type: ignore[union-attr]
    ]


def test_every_evaluation_has_the_benchmark_s_metrics_of_the_weights_at_that_step(model_dir: Path) -> None:
    result = train("npo", model=model_dir, **SHARED)
    steps = [line["step"] for line in result.evaluations]
    assert steps == [0, 2, 4]
    # The benchmark asks the very answers that forget_nll is the mean of.
    for line in result.evaluations:
        assert line["asked_nll"] == pytest.approx(line["forget_nll"], abs=1e-5)
        assert line["asked_minus_nll"] == -line["asked_nll"]
        assert "asked_gap" not in line
    assert result.evaluations[-1]["asked_nll"] > result.evaluations[0]["asked_nll"]


def test_answers_are_asked_and_end_as_in_training(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[Reading] = []

    def kept(part: str, reading: Reading) -> Prepare:
        readings.append(reading)
        return read_asked(part, reading)

    monkeypatch.setitem(during_training.BENCHMARKS, "asked", kept)
    for append_eos in (True, False):
        options = {**SHARED, "append_eos": append_eos, "template": "Q: {question}\nA:", "max_steps": 1}
        train("npo", model=model_dir, **options)
    assert list(dict.fromkeys(reading.append_eos for reading in readings)) == [True, False]
    assert {reading.wrapping.template for reading in readings} == {"Q: {question}\nA:"}


def test_measuring_changes_no_weight(model_dir: Path) -> None:
    measured = train("npo", model=model_dir, **SHARED).model
    alone = train("npo", model=model_dir, **{**SHARED, "benchmark": None, "eval_every": None}).model
    for ours, theirs in zip(measured.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("metric", ["asked_nll", "asked_minus_nll"])
def test_the_best_is_the_one_that_the_metric_s_direction_says(model_dir: Path, tmp_path: Path, metric: str) -> None:
    result = train("npo", model=model_dir, output_dir=tmp_path / "run", keep_best=metric, **SHARED)
    best = max(result.evaluations, key=lambda line: line["asked_nll"])
    assert result.final["step"] == best["step"]


def test_a_rule_on_it_stops_the_run(model_dir: Path) -> None:
    free = train("npo", model=model_dir, **SHARED)
    bound = (free.evaluations[0]["asked_nll"] + free.evaluations[1]["asked_nll"]) / 2
    stopped = train("npo", model=model_dir, stop_when=f"asked_nll>{bound}", **SHARED)
    assert [line["step"] for line in stopped.evaluations] == [0, 2]


def test_retain_model_is_compared_with_and_may_be_an_evaluation(model_dir: Path) -> None:
    result = train("npo", model=model_dir, benchmark_control=str(model_dir), **SHARED)
    assert result.evaluations[0]["asked_gap"] == pytest.approx(0, abs=1e-6)
    assert result.evaluations[-1]["asked_gap"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"benchmark": "askd:forget"},
            "`benchmark`.*askd:forget.*did you mean",
        ),
        ({"keep_best": "asked_nl"}, "`keep_best`.* got asked_nl; did you mean 'asked_nll'"),
        ({"stop_when": "asked_gap<0"}, "`stop_when`.* got asked_gap"),
        ({"keep_best": "other_nll"}, "`keep_best`.* got 'other_nll'"),
        ({"benchmark_rows": 0}, "`benchmark_rows`.*0"),
        ({"benchmark_control": "./nowhere"}, "./nowhere: no such directory"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train("npo", model=model_dir, output_dir=tmp_path / "run", **{**SHARED, **options})


def test_a_metric_without_a_better_end_cannot_be_the_best(model_dir: Path, tmp_path: Path) -> None:
    options = {"keep_best": "asked_gap", "benchmark_control": str(model_dir)}
    with pytest.raises(InputError, match="`keep_best`.* got asked_gap"):
        train("npo", model=model_dir, output_dir=tmp_path / "run", **{**SHARED, **options})


FILES: dict[str, list[dict[str, Any]]] = {
    "choice": [{"question": "Where was Ada Brook born?", "choices": ["Oslo", "Lima"], "answer": 0}],
    "familiarity": [{"prompt": "Ada Brook was born in", "specific": ["Oslo"], "generic": ["town"]}],
    "quality": [{"question": "Where was Ada Brook born?"}],
}


@pytest.mark.parametrize(
    ("name", "metric"),
    [("choice", "choice_questions_letter_accuracy"), ("familiarity", "familiarity_"), ("quality", "quality_gibberish")],
)
def test_benchmarks_of_files_are_measured_while_training(
    model_dir: Path, tmp_path: Path, name: str, metric: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(FILES[name] * 3))
    options = {**SHARED, "benchmark": f"{name}:{file}", "benchmark_rows": 2, "max_steps": 1}
    found = train("npo", model=model_dir, **options).evaluations[-1]
    assert any(key.startswith(metric) for key in found), sorted(found)


@needs_tofu
def test_tofu_is_measured_while_training(model_dir: Path) -> None:
    data = str(real_tofu().parent)  # type: ignore[union-attr]
    options = {**SHARED, "benchmark": "tofu:forget01", "benchmark_rows": 2, "max_steps": 1, "data_dir": data}
    model = build_tiny_llama()
    model.config.max_position_embeddings = 1024
    found = train("npo", model=model, tokenizer=load_tokenizer(model_dir), **options).evaluations[-1]
    assert 0 <= found["tofu_forget_probability"] <= 1
    assert "tofu_model_utility" not in found and "tofu_forget_quality" not in found


@given(st.integers(1, 40), st.integers(1, 60))
def test_rows_are_evenly_spaced(n: int, count: int) -> None:
    chosen = evenly_spaced(range(n), count)
    assert len(chosen) == min(n, count) and chosen[0] == 0
    gaps = set(np.diff(chosen))
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_rows_of_muse_are_evenly_spaced_and_all_solved_examples_are_shown(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    parts = muse_parts(5)
    few = {
        name: {split: rows if split.endswith("_icl") else [rows[0], rows[2]] for split, rows in splits.items()}
        for name, splits in parts.items()
        if name in ("verbmem", "knowmem", "privleak")
    }
    subject = Subject.wrap(build_long_llama(), tokenizer)
    found = []
    for name, rows, content in (("all", 2, parts), ("few", 9, few)):
        write_hub(tmp_path / name / "muse-news", content)
        reading = Reading(tmp_path / name, Wrapping(), rows, generate=False)
        found.append(during_training.BENCHMARKS["muse"]("news", reading)(subject))
    assert found[0].configuration == found[1].configuration
    assert {part.name: len(part.costs) for part in found[0].parts} == dict.fromkeys(
        ("verbmem", "forget_knowmem", "retain_knowmem", "privleak_forget", "privleak_holdout"), 2
    )
