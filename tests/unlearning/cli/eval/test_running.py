"""What `unlearn eval` prints: whole numbers at any width, what was left out, a dash where nothing is better."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from unlearning.cli.eval.running import show
from unlearning.evaluation.harness import Evaluation
from unlearning.evaluation.statistics import Metric, Resampled


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_width_cuts_a_number(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    score = Resampled(0.123456, np.linspace(0.1, 0.3, 41), 40)
    other = Resampled(2e-7, np.full(41, 2e-7), 40)
    name = "forget_quality_arithmetic_statistic"
    metrics = [
        Metric(name, score, "closer to the control is better", "a distance"),
        Metric("length", score, "descriptive, no direction", "words"),
        Metric("auc", None, "lower is better", "an area", "needs a hold-out set; give --holdout"),
    ]
    retain = [Metric(name, other, "closer to the control is better", "a distance")]
    rows = pd.DataFrame({"set": ["forget"], "row": [0]})
    show(Evaluation("tofu", "demo:npo", rows, metrics, rows, retain, "demo:never"), Path("runs/x"))
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if name in line)
    assert line.split() == f"{name} 0.123 [0.105, 0.295] 2.00e-07 0.123 [0.105, 0.295] 40 closer to the control".split()
    assert next(line for line in lines if "length" in line).split()[-1] == "-"
    assert "left out: auc (needs a hold-out set; give --holdout)" in lines
    assert "run runs/x" in lines
