"""What a plan predicts is compared with the labels of scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analyses.verdict_benchmark import check_plan
from analyses.verdict_benchmark.families import Family
from dissect.stress.core.result import StressResult
from dissect.verdicts.planning.populations import Populations
from tests.dissect.verdicts.planning.invented import PLAIN_MODELS, RULE, results_of


def test_a_score_gives_one_label() -> None:
    low, high = np.array([0.0, 0.2, 0.0, 0.06]), np.array([0.05, 0.5, 0.4, 0.07])
    found = check_plan.shares_of_labels(low, high, RULE)
    assert found == {"suppressed": 0.5, "inconclusive": 0.25, "erased": 0.25}


@pytest.mark.parametrize("knows", [False, True])
def test_models_of_the_plan_get_the_labels_that_it_predicts(
    knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_results(folder: Path) -> dict[str, StressResult]:
        known = [knows] * 30
        return {one.test: one for one in results_of(int(folder.name), people=30, each=4, run_sd=0.01, known=known)}

    monkeypatch.setattr(check_plan, "read_results", read_results)
    monkeypatch.setattr(check_plan, "shipped", lambda *_, **__: Populations(PLAIN_MODELS, PLAIN_MODELS))
    family = Family("llama", 3, tmp_path)
    cell = check_plan.Cell("invented", float(knows), tuple((family, str(number)) for number in range(6)))
    found = check_plan.compared(cell, 20, tmp_path, replace(RULE, run_sd=0.01), controls=1)
    assert found["verdicts"] == 6 * check_plan.DRAWS
    label = "suppressed" if knows else "inconclusive"
    for said in ("observed", "predicted"):
        assert float(str(found[f"{label}, {said}"])) > 0.85
    for end in ("low", "high"):
        assert float(str(found[f"{end}, observed"])) == pytest.approx(float(str(found[f"{end}, predicted"])), abs=0.1)
