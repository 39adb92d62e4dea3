"""What a plan rests on is found again in results of models that vary as it says."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analyses.verdict_benchmark import measure_spread
from analyses.verdict_benchmark.families import Family
from dissect.stress.core.result import StressResult
from dissect.verdicts.planning.populations import Population
from dissect.verdicts.rule import RuleEntry, frozen_rule
from tests.dissect.verdicts.planning.invented import results_of


def test_the_population_of_the_results_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("llama", 3, tmp_path / "models")
    people = [person.name for person in family.world.having("forget")]
    one = np.ones((1, 1))
    true = Population(np.array([0.0, 1.0]), 0.7 * one, np.array([[[-0.2], [-0.4]]]), 0.02 * one, 0.3 * one)

    def read_results(folder: Path) -> dict[str, StressResult]:
        _, is_part, rest = folder.name.rpartition("part-")
        share = float(rest.split("-")[0]) if is_part else 0.0
        (found,) = results_of(
            zlib.crc32(folder.name.encode()),
            people=len(people),
            each=40,
            share=share,
            population=true,
            run_sd=0.0,
            tests=("deranged_relearning",),
            known=[name in measure_spread.people_known(family, share) if share else False for name in people],
            names=people,
        )
        return {found.test: found}

    monkeypatch.setattr(measure_spread, "read_results", read_results)
    # Floors of 1/2 and controls around 1/2: without the control's rows, the same residuals with more noise.
    rule = replace(frozen_rule(), tests=(RuleEntry("deranged_relearning"),))
    found = measure_spread.measured([family], tmp_path, rule, has_control=False)
    assert found.avoiding.known == pytest.approx(0.7 * np.ones((2, 1)), abs=0.12)
    for share in (0.0, 0.25, 0.75):
        assert found.avoiding.unknown_at(share).mean() == pytest.approx(true.unknown_at(share).item(), abs=0.1)
    assert found.plain.unknown_at(0).mean() == pytest.approx(-0.2, abs=0.1)
    assert found.avoiding.between.item() == pytest.approx(0.02, abs=0.02)
    assert found.avoiding.within.item() == pytest.approx(0.34, rel=0.1), "of the model and of the control"
