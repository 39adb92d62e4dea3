"""Attacks that took hold, and those that did not: made-up values, then real attacks of bad strength."""

import numpy as np
import pandas as pd
import pytest

from dissect.stress.core.finetuning import Recipe
from dissect.stress.core.result import StressResult, value_rows
from dissect.stress.core.validity import invalid_variants
from dissect.stress.relearning import relearn_disjoint
from tests.dissect.stress.constructed import case_of, model

N = 24


def made_up(ranks, rows=(), *, control=True, settings=None, floors=None):
    """A result of constant ranks by role and variant, with rows of the table `validity`."""
    facts = case_of(model("demo:base"), n=N).forget
    values = [
        (role, variant, {"rank": np.full(N, value)})
        for (role, variant), value in ranks.items()
        if control or not role.startswith("control")
    ]
    names = ("role", "variant", "loss_before", "loss_after", "utility")
    table = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows], columns=list(names))
    return StressResult(
        test="made-up",
        level=4,
        measure="rank",
        frame=value_rows(facts, values),
        proves="nothing",
        settings=settings or {},
        seconds=0.0,
        floors={"rank": 0.5} if floors is None else floors,
        tables={"validity": table} if rows else {},
    )


def ranks(base=0.95, unlearned=0.7, control=0.5, plain=0.4):
    return {
        ("base", ""): 1.0,
        ("unlearned", ""): plain,
        ("control", ""): 0.5,
        ("base", "a"): base,
        ("unlearned", "a"): unlearned,
        ("control", "a"): control,
    }


def training(base=(0.01, 0.0, 0.9), unlearned=(6.0, 0.05, 0.9), control=(2.0, 0.05, 0.9)):
    return [("base", "a", *base), ("unlearned", "a", *unlearned), ("control", "a", *control)]


@pytest.mark.parametrize("control", [True, False])
def test_an_attack_under_which_the_base_knows_and_the_others_learn_took_hold(control):
    rows = training() if control else training()[:2]
    result = made_up(ranks(), rows, control=control)
    assert invalid_variants(result) == {}
    assert result.residual().rho == pytest.approx(0.4) and result.residual().variant == "a"
    assert result.residuals()["valid"].all()


@pytest.mark.parametrize(
    ("values", "rows", "reason"),
    [
        (ranks(base=0.8), training(), "the base keeps 60 % of its knowledge"),
        (ranks(base=0.95, control=0.7), training(), "the base keeps 50 % of its knowledge"),
        (ranks(base=0.2), training(), "the base keeps 0 %"),
        (ranks(), training(unlearned=(6.0, 1.0, 0.9)), "the unlearned model did not learn"),
        (ranks(), training(control=(2.0, 1.0, 0.9)), "the control did not learn"),
        (ranks(), training(unlearned=(6.0, float("nan"), 0.9)), "the training of the unlearned model diverged"),
        (ranks(), training(base=(0.1, float("inf"), 0.9)), "the training of the base diverged (loss 0.1 before)"),
        (ranks(), training(unlearned=(6.0, 0.1, 0.2)), "the unlearned model still answers 20 %"),
        (ranks(), training(base=(0.0, 0.0, 0.2)), "the base still answers 20 %"),
    ],
)
def test_an_attack_that_did_not_take_hold_says_why_and_gives_no_residual(values, rows, reason):
    result = made_up(values, rows)
    assert list(invalid_variants(result)) == ["a"] and reason.replace(" %", "%") in invalid_variants(result)["a"]
    found = result.residual()
    assert found.rho is None and found.low is None and found.variant == "a" and found.against == "control"
    assert found.reason.startswith("the attack did not take hold: a: ") and reason.replace(" %", "%") in found.reason
    table = result.residuals().set_index("variant")
    assert not table.loc["a", "valid"] and table.loc["", "valid"]
    assert reason.replace(" %", "%") in table.loc["a", "reason"] and table.loc["a", "rho"] is not None


def test_what_counts_as_learnt_is_what_the_base_comes_to():
    """Texts that all models know already leave nothing to learn; those that nobody knows stay as high as the base's."""
    known = training(unlearned=(0.01, 0.005, 1.0), control=(0.02, 0.01, 1.0))
    hard = training(base=(3.0, 2.0, 1.0), unlearned=(3.1, 2.05, 1.0), control=(3.0, 2.0, 1.0))
    half = training(base=(3.0, 1.0, 1.0), unlearned=(9.0, 2.0, 1.0), control=(3.0, 1.0, 1.0))
    assert not invalid_variants(made_up(ranks(), known)) and not invalid_variants(made_up(ranks(), hard))
    assert "unlearned" in invalid_variants(made_up(ranks(), half))["a"]


def test_several_controls_are_averaged_and_all_must_learn():
    values = ranks(base=0.95, control=0.62) | {("control 2", ""): 0.5, ("control 2", "a"): 0.5}
    assert invalid_variants(made_up(ranks(base=0.95, control=0.62), training()))
    assert not invalid_variants(made_up(values, training()))
    rows = [*training(), ("control 2", "a", 2.0, 1.0, 0.9)]
    assert "the control 2 did not learn" in invalid_variants(made_up(values, rows))["a"]


def test_an_attack_that_teaches_false_answers_may_ask_less_of_base_and_utility():
    rows = training(base=(3.0, 0.0, 0.2), unlearned=(6.0, 0.0, 0.2), control=(2.0, 0.0, 0.2))
    asked_less = {"base_keeps": 0.5, "still_useful": 0.1}
    assert len(invalid_variants(made_up(ranks(base=0.8), rows))["a"].split("; ")) == 3
    assert not invalid_variants(made_up(ranks(base=0.8), rows, settings=asked_less))


def test_utility_that_was_not_measured_is_not_asked():
    nan = float("nan")
    rows = training(base=(0.0, 0.0, nan), unlearned=(6.0, 0.0, nan), control=(2.0, 0.0, nan))
    assert not invalid_variants(made_up(ranks(), rows))


def test_an_attack_that_teaches_is_compared_with_the_control_before_it():
    values, rows = ranks(base=1.0, control=0.9), training(unlearned=(6.0, 2.5, 1.0), control=(2.0, 0.5, 1.0))
    assert invalid_variants(made_up(values, rows))
    assert not invalid_variants(made_up(values, rows, settings={"teaches": True}))


def test_an_attack_that_overwrites_may_ask_less_of_the_base():
    assert invalid_variants(made_up(ranks(base=0.7), training()))
    assert not invalid_variants(made_up(ranks(base=0.7), training(), settings={"base_keeps": 0.25}))
    assert invalid_variants(made_up(ranks(base=0.6), training(), settings={"base_keeps": 0.25}))


def test_without_rows_of_the_base_nothing_is_asked():
    values = {key: value for key, value in ranks().items() if key != ("base", "a")}
    assert not invalid_variants(made_up(values)) and made_up(values).residual().rho == pytest.approx(0.4)


def test_only_valid_variants_count_and_so_does_the_model_without_attack():
    """For the control as well: what it shows without attack is in its best."""
    assert not invalid_variants(made_up(ranks(base=0.8)))  # without training less is asked
    values = ranks(unlearned=0.9, base=0.6, plain=0.6)  # `a` wrecks the base
    values |= {("base", "b"): 1.0, ("unlearned", "b"): 0.55, ("control", "b"): 0.4}
    found = made_up(values).residual()
    assert found.variant == "" and found.rho == pytest.approx((0.6 - 0.5) / 0.5)
    values |= {("unlearned", "b"): 0.8}
    assert made_up(values).residual().rho == pytest.approx((0.8 - 0.5) / 0.5)


@pytest.mark.parametrize("rate", [0.2, 0.002])
def test_ten_times_too_much_or_too_little_gives_no_residual(rate):
    case = case_of(model("demo:npo"), n=24)
    result = relearn_disjoint(case, recipes=[Recipe(rate, steps=10, batch_size=12)])
    found = result.residual()
    assert found.rho is None and found.low is None
    assert "did not take hold" in found.reason and any("did not take hold" in note for note in result.notes)
    assert not result.residuals().query("variant != ''")["valid"].any()
