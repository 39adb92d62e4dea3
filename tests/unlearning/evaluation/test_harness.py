"""What every benchmark runs on: order, resume, retain results, what is written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from unlearning.common.errors import InputError
from unlearning.evaluation.harness import Benchmark, Evaluation, Part, Row, evaluate
from unlearning.evaluation.statistics import Metric, Resampled, Sample
from unlearning.evaluation.subject import Subject

COSTS = [5, 1, 4, 1, 3]


class Asked:
    """A benchmark of five rows whose scores are a function of the model and the row, and which counts its calls."""

    def __init__(self, *, split: str = "forget10", fails_at: int | None = None) -> None:
        self.split = split
        self.fails_at = fails_at
        self.calls: list[list[int]] = []

    def __call__(self, subject: Subject) -> Benchmark:
        level = int(subject.sha256[:4], 16) / 2**16

        def score(places: Sequence[int]) -> list[Row]:
            if len(self.calls) == self.fails_at:
                raise KeyboardInterrupt
            self.calls.append(list(places))
            return [
                {"id": f"q{place}", "group": "ab"[place % 2], "score": level + place**2, "parts": [0.5, float(place)]}
                for place in places
            ]

        def score_extra(places: Sequence[int]) -> list[Row]:
            return [{"text": f"row {place}", "known": bool(place)} for place in places]

        return Benchmark(
            name="asked",
            configuration={"split": self.split, "data_sha256": self.split * 8},
            parts=[Part("forget", COSTS, score), Part("extra", [1, 1], score_extra, at_once=2)],
            summarise=summarise,
            notes=("five questions",),
        )


def summarise(rows: pd.DataFrame, control_rows: pd.DataFrame | None) -> list[Metric]:
    forget = rows[rows["set"] == "forget"]
    mean = Sample("forget", forget["group"].tolist()).mean(forget["score"])
    gap = None
    if control_rows is not None:
        theirs = control_rows[control_rows["set"] == "forget"]["score"].to_numpy()
        gap = Resampled(float((forget["score"].to_numpy() - theirs).max()), np.zeros(3), len(forget))
    return [
        Metric("score", mean, "lower is better", "mean of the scores"),
        Metric("gap", gap, "closer to 0 is better", "largest gap", None if gap else "give --control", False),
    ]


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer, name="npo")


@pytest.fixture(scope="module")
def never(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(seed=1), tokenizer, name="never")


def quiet(prepare: Callable[[Subject], Benchmark], subject: Subject, **options: Any) -> Evaluation:
    return evaluate(prepare, subject, **{"batch_size": 2, "progress": False, **options})


def test_rows_come_in_the_data_s_order_whatever_was_scored_first(subject: Subject) -> None:
    asked = Asked()
    found = quiet(asked, subject)
    assert asked.calls == [[1, 3], [4, 2], [0]]  # of similar cost together
    assert found.rows["row"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.rows["set"].tolist() == ["forget"] * 5 + ["extra"] * 2
    assert found.rows["id"].tolist()[:5] == ["q0", "q1", "q2", "q3", "q4"]
    assert found.rows["text"].tolist()[5:] == ["row 0", "row 1"]


def test_run_directory_holds_rows_metrics_and_what_was_left_out(subject: Subject, tmp_path: Path) -> None:
    found = quiet(Asked(), subject, out=tmp_path / "run")
    kept = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert kept["score"].tolist()[:5] == found.rows["score"].tolist()[:5]
    assert [list(map(float, parts)) for parts in kept["parts"][:5]] == found.rows["parts"].tolist()[:5]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["left_out"] == {"gap": "give --control"}
    assert summary["rows"] == {"forget": 5, "extra": 2}
    assert summary["metrics"]["score"]["value"] == pytest.approx(found["score"])
    assert summary["metrics"]["score"]["direction"] == "lower is better"
    assert summary["metrics"]["score"]["low"] < summary["metrics"]["score"]["high"]
    assert summary["notes"] == ["five questions"]
    assert not (tmp_path / "run" / "parts").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["configuration"]["model_sha256"] == subject.sha256
    assert record["configuration"]["command"] == "unlearn eval asked"
    assert record["status"] == "complete"


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_killed_run_goes_on_with_the_rows_that_are_left(subject: Subject, tmp_path: Path, fails_at: int) -> None:
    whole = quiet(Asked(), subject).rows
    with pytest.raises(KeyboardInterrupt):
        quiet(Asked(fails_at=fails_at), subject, out=tmp_path / "run")
    rest = Asked()
    found = quiet(rest, subject, out=tmp_path / "run", batch_size=3)
    assert sum(map(len, rest.calls)) == 5 - 2 * fails_at
    pd.testing.assert_frame_equal(found.rows.drop(columns="parts"), whole.drop(columns="parts"), check_dtype=False)


def test_finished_run_is_not_scored_again(subject: Subject, tmp_path: Path) -> None:
    first = quiet(Asked(), subject, out=tmp_path / "run")
    again = Asked()
    second = quiet(again, subject, out=tmp_path / "run")
    assert again.calls == []
    assert second["score"] == first["score"]


def test_run_of_another_model_or_split_is_refused(subject: Subject, never: Subject, tmp_path: Path) -> None:
    quiet(Asked(), subject, out=tmp_path / "run")
    with pytest.raises(InputError, match="holds another run: its hash of model is"):
        quiet(Asked(), never, out=tmp_path / "run")
    with pytest.raises(InputError, match="its split is forget10, not forget05"):
        quiet(Asked(split="forget05"), subject, out=tmp_path / "run")


def test_retain_model_is_scored_once_and_remembered_by_hash(
    subject: Subject, never: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    alone = quiet(Asked(), never)
    first = Asked()
    found = quiet(first, subject, control=never, out=tmp_path / "run")
    assert sum(map(len, first.calls)) == 10
    assert found.control_rows is not None
    assert found["gap"] == pytest.approx(found["score"] - alone["score"])  # type: ignore[operator]
    again = Asked()
    assert quiet(again, subject, control=never)["gap"] == found["gap"]
    assert sum(map(len, again.calls)) == 5
    other_split = Asked(split="forget05")
    quiet(other_split, subject, control=never)
    assert sum(map(len, other_split.calls)) == 10
    record = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["score"]
    assert record["control"] == pytest.approx(alone["score"])
    assert record["difference"] == pytest.approx(found["score"] - alone["score"])  # type: ignore[operator]
    # Every row differs by the same number, so the paired interval has no width.
    assert record["difference_low"] == pytest.approx(record["difference_high"], abs=1e-12)
    assert (tmp_path / "run" / "control.parquet").is_file()


def test_retain_result_of_a_finished_run_gives_the_same(subject: Subject, never: Subject, tmp_path: Path) -> None:
    quiet(Asked(), never, out=tmp_path / "never")
    by_result = quiet(Asked(), subject, control=tmp_path / "never")
    assert by_result["gap"] == quiet(Asked(), subject, control=never)["gap"]


def test_retain_model_can_be_given_after_the_run(subject: Subject, never: Subject, tmp_path: Path) -> None:
    assert quiet(Asked(), subject, out=tmp_path / "run")["gap"] is None
    again = Asked()
    assert quiet(again, subject, out=tmp_path / "run", control=never)["gap"] is not None
    assert [call for call in again.calls if call] == again.calls and sum(map(len, again.calls)) in (0, 5)
    assert "gap" in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]


def test_retain_result_of_another_split_is_refused(subject: Subject, never: Subject, tmp_path: Path) -> None:
    quiet(Asked(split="forget05"), never, out=tmp_path / "never")
    with pytest.raises(InputError, match="control.*split.*forget05.*forget10"):
        quiet(Asked(), subject, control=tmp_path / "never")


def test_retain_result_that_is_not_there_or_not_finished_is_refused(
    subject: Subject, never: Subject, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        quiet(Asked(), subject, control=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quiet(Asked(fails_at=1), never, out=tmp_path / "never")
    with pytest.raises(InputError, match="not finished.*`unlearn eval asked`"):
        quiet(Asked(), subject, control=tmp_path / "never")


def test_batch_size_of_nothing_is_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match="`batch_size`.*0"):
        quiet(Asked(), subject, batch_size=0)


def test_metric_that_is_not_there_has_no_value(subject: Subject) -> None:
    found = quiet(Asked(), subject)
    assert found["gap"] is None
    with pytest.raises(KeyError):
        found["nothing"]
