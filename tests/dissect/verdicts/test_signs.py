"""What may keep a model from being called erased, read from made-up results of known content."""

import numpy as np
import pandas as pd
import pytest

from dissect.stress.core.result import StressResult, value_rows
from dissect.verdicts.signs import NOT_TAKEN, did_not_take_hold, read_signs
from dissect.verdicts.spread import RunSpread
from tests.dissect.stress.constructed import case_of, model

N = 24
NARROW = RunSpread(0.0, 8, 1)
WIDE = RunSpread(0.5, 8, 1)


@pytest.fixture(scope="module")
def facts():
    return case_of(model("demo:base"), n=N).forget


def result(facts, test, level, unlearned, *, control=None, measure="rank", base=1.0):
    noise = np.random.default_rng(len(test)).uniform(-0.05, 0.05, (3, N))
    values = {"base": base + 0 * noise[0], "unlearned": unlearned + noise[1]}
    if control is not None:
        values["control"] = control + noise[2]
    frame = value_rows(facts, [(role, "", {measure: row}) for role, row in values.items()])
    return StressResult(
        test=test, level=level, measure=measure, frame=frame, proves="", settings={}, seconds=0.0, floors={"rank": 0.5}
    )


def test_a_test_that_reads_and_finds_something_is_a_sign(facts):
    lens = result(facts, "lens", 1, 0.7, control=0.5)
    found = read_signs([lens, result(facts, "probe", 1, 0.5, control=0.5)], NARROW)
    assert list(found.shown) == ["lens"] and 0 < found.shown["lens"] < lens.residual().rho
    assert not read_signs([lens], WIDE).shown  # training runs may differ by as much
    assert not read_signs([result(facts, "lens", 2, 0.7, control=0.5)], NARROW).shown
    assert not found.allow_erased


@pytest.mark.parametrize(("rank", "shown"), [(0.5, False), (0.8, True)])
def test_without_a_control_only_a_rank_above_chance_shows_knowledge(facts, rank, shown):
    """Every model gives an answer some probability; what one without the knowledge gives is known of ranks only."""
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, N)
    scored = {"base": (1.0, 0.9), "unlearned": (rank + noise, 0.2)}
    rows = [(role, "", {"rank": r + 0 * noise, "probability": p + 0 * noise}) for role, (r, p) in scored.items()]
    plain = StressResult(
        test="without_attack",
        level=0,
        measure="probability",
        frame=value_rows(facts, rows),
        proves="",
        settings={},
        seconds=0.0,
        floors={"probability": 0.0, "rank": 0.5},
    )
    assert plain.residual().low > 0
    assert bool(read_signs([plain], NARROW).shown) == shown
    # With a control whose probability is no lower, the rank shows it too.
    control = value_rows(facts, [("control", "", {"rank": 0.5 + noise, "probability": 0.25 + 0 * noise})])
    plain.frame = pd.concat([plain.frame, control], ignore_index=True)
    assert plain.residual().high < 0
    assert bool(read_signs([plain], NARROW).shown) == shown


def test_attacks_that_took_hold_are_counted(facts):
    nothing = [result(facts, name, level, 0.5, control=0.5) for name, level in (("one", 3), ("two", 4), ("lens", 1))]
    found = read_signs(nothing, NARROW)
    assert found.attacks == ("one", "two") and not found.not_taken and found.allow_erased
    assert not read_signs(nothing[1:], NARROW).allow_erased
    no_gap = result(facts, "empty", 4, 0.5, control=1.0)
    assert read_signs([no_gap], NARROW).attacks == () and no_gap.residual().rho is None


def test_an_attack_that_did_not_take_hold_is_told_from_one_without_a_residual():
    assert did_not_take_hold(f"{NOT_TAKEN}: its own training loss did not fall")
    assert not did_not_take_hold("the rank of the base is not above the control") and not did_not_take_hold("")


@pytest.mark.parametrize(
    ("unlearned", "control", "spread", "avoided"),
    [
        (0.3, 0.5, NARROW, True),
        (0.3, 0.5, WIDE, False),  # training runs may differ by as much
        (0.5, 0.5, NARROW, False),
        (0.3, 0.3, NARROW, False),  # the control ranks them as low: they are implausible answers
        (0.3, None, NARROW, True),
        (0.7, 0.9, NARROW, False),  # below the control, not below chance
    ],
)
def test_answers_far_below_chance_are_avoided(facts, unlearned, control, spread, avoided):
    plain = result(facts, "without_attack", 0, unlearned, control=control)
    found = read_signs([plain], spread)
    assert (found.avoided is not None) == avoided
    if avoided:
        assert found.avoided == pytest.approx(0.3, abs=0.03) and not found.allow_erased
