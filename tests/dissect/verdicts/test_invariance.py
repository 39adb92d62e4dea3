"""A rewriting that changes no output moves no verdict; a verdict that moved is told."""

import pandas as pd
import pytest

from dissect import verdict
from dissect.models.pair import ModelPair
from dissect.verdicts.invariance import Invariance, check_invariance
from tests.dissect.stress.constructed import model, questions


def forms(*rows: tuple[str, float]) -> Invariance:
    columns = {"low": 0.0, "high": 1.0, "rho_moved": 0.001}
    return Invariance(pd.DataFrame([{"form": "as given", "label": label, "score": s, **columns} for label, s in rows]))


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        ([("suppressed", 0.47), ("suppressed", 0.46)], True),
        ([("suppressed", 0.47), ("erased", 0.46)], False),
        ([("suppressed", 0.47), ("suppressed", 0.44)], False),
        ([("inconclusive", float("nan")), ("inconclusive", float("nan"))], True),
    ],
)
def test_a_label_or_a_score_that_moved_is_told(rows: list[tuple[str, float]], holds: bool) -> None:
    found = forms(*rows)
    assert found.holds is holds
    assert found.sentence().startswith("invariance holds" if holds else "invariance fails")


@pytest.mark.slow
@pytest.mark.parametrize("control", ["demo:never", None])
def test_a_rewritten_model_gets_the_verdict_of_the_given_one(control: str | None) -> None:
    pair = ModelPair(model("demo:base"), model("demo:npo"))
    options = {"budget": "quick", "limit": 40, "control": control}
    forget = questions("forget")
    found = verdict(pair, forget, progress=False, **options)
    checked = check_invariance(found, pair, forget, seeds=(0, 1), **options)
    assert checked.holds
    assert checked.frame["rho_moved"].max() < 0.02
    assert list(checked.frame["form"]) == ["as given", "rewriting 0", "rewriting 1"]
