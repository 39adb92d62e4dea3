"""`unlearning.evaluate`: models by name or in memory, with and without a control, tables that are copies."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from unlearning import Evaluation, InputError, evaluate
from unlearning.evaluation.harness import Benchmark, Part
from unlearning.evaluation.statistics import Metric, Sample
from unlearning.evaluation.subject import Subject


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "Where was Ada Brook born?"}, {"prompt": "Who is Ben Hill?"}]))
    return path


def quality(model: object, prompts: Path, **options: object) -> Evaluation:
    given = {"prompts": prompts, "max_new_tokens": 3, "progress": False, **options}
    return evaluate("quality", model=model, **given)  # type: ignore[arg-type]


def test_a_loaded_model_gives_the_numbers_of_its_directory(
    model_dir: Path, prompts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    by_name = quality(model_dir, prompts)
    loaded = quality(build_tiny_llama(), prompts, tokenizer=tokenizer)
    assert loaded.rows["text"].tolist() == by_name.rows["text"].tolist()
    assert loaded["length"] == by_name["length"]
    with pytest.raises(InputError, match="`tokenizer`"):
        quality(build_tiny_llama(), prompts)


def test_frame_has_intervals_and_the_control(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    alone = quality(model_dir, prompts, control="none", output_dir=tmp_path / "alone")
    assert alone.control is None and alone.frame["control"].isna().all()
    compared = quality(model_dir, prompts, control_result=tmp_path / "alone")
    frame = compared.frame
    summary = compared.summary()["metrics"]
    assert list(frame.index) == list(summary)
    assert frame.loc["length", "value"] == summary["length"]["value"]
    assert frame.loc["length", "difference"] == 0 and frame.loc["length", "n"] == 2
    assert frame.loc["length", "low"] <= frame.loc["length", "value"] <= frame.loc["length", "high"]
    assert np.isnan(frame.loc["distinct_1", "low"])


def test_tables_are_copies(model_dir: Path, prompts: Path) -> None:
    found = quality(model_dir, prompts)
    before = found.summary()
    found.rows.drop(columns="set", inplace=True)
    found.frame["value"] *= 100
    assert found.summary() == before
    assert "set" in found.rows


def test_a_benchmark_of_ones_own_is_a_function(model_dir: Path) -> None:
    def prepare(subject: Subject) -> Benchmark:
        part = Part("all", [1, 1], lambda indices: [{"id": str(index), "size": float(index)} for index in indices])

        def summarise(rows, _control_rows):  # type: ignore[no-untyped-def]
            mean = Sample("all", [""] * len(rows)).mean(rows["size"])
            return [Metric("size", mean, "higher is better", f"mean size for {subject.name}")]

        return Benchmark("own", {"version": 1}, [part], summarise)

    assert evaluate(prepare, model=model_dir, progress=False)["size"] == 0.5
    with pytest.raises(InputError, match="options.*limit"):
        evaluate(prepare, model=model_dir, limit=3)


def test_two_controls_are_refused(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`control`.*`control_result`"):
        quality(model_dir, prompts, control=model_dir, control_result=tmp_path)
    with pytest.raises(InputError, match="`control_result`"):
        quality(model_dir, prompts, control_result=tmp_path)
