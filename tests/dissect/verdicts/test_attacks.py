"""How attacks went, from made-up results."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dissect.stress.core.result import StressResult, value_rows
from dissect.verdicts.attacks import COLUMNS, LITTLE, attack_table, remarks, tried
from tests.dissect.stress.constructed import case_of, model

N = 8


def result(ranks, validity=None, test="relearning"):
    facts = case_of(model("demo:base"), n=N).forget
    frame = value_rows(facts, [(role, variant, {"rank": np.full(N, rank)}) for (role, variant), rank in ranks.items()])
    tables = {} if validity is None else {"validity": pd.DataFrame(validity)}
    options = {"proves": "", "settings": {}, "seconds": 0.0}
    return StressResult(test=test, level=4, measure="rank", frame=frame, tables=tables, **options)


PLAIN = {("base", ""): 1.0, ("unlearned", ""): 0.5, ("control", ""): 0.5}


def attacked(variant, base, others=0.5):
    return {("base", variant): base, ("unlearned", variant): others, ("control", variant): others}


def test_each_variant_is_shown_with_its_numbers():
    trained = [
        {"role": role, "variant": variant, "loss_before": 2.0, "loss_after": 0.1, "utility": utility}
        for variant in ("mild", "wild")
        for role, utility in (("base", 1.0), ("unlearned", 0.9), ("control", float("nan")))
    ]
    table = attack_table([result(PLAIN | attacked("mild", 0.95) | attacked("wild", 0.55), trained)])
    assert list(table.columns) == list(COLUMNS) and len(table) == 6
    by = table.set_index(["variant", "role"])
    assert by.loc[("mild", "base"), "rank"] == pytest.approx(0.95) and by.loc[("wild", "unlearned"), "utility"] == 0.9
    assert by.loc["mild", "took_hold"].all() and not by.loc["wild", "took_hold"].any()
    assert by.loc["wild", "reason"].str.contains("the base keeps").all() and (by.loc["mild", "reason"] == "").all()
    assert (table["loss_after"] == 0.1).all() and table["utility"].isna().sum() == 2


def test_tests_without_the_base_under_attack_are_left_out():
    only_read = {(role, "layer 3"): 0.7 for role in ("base", "unlearned", "control")}
    not_checked = PLAIN | {("unlearned", "a"): 0.6, ("control", "a"): 0.5}
    table = attack_table([result(only_read, test="lens"), result(not_checked, test="old"), result(PLAIN, test="plain")])
    assert table.empty and list(table.columns) == list(COLUMNS)
    without_training = attack_table([result(PLAIN | attacked("nf4", 0.9), test="quantisation")])
    assert (
        list(without_training["rank"]) == pytest.approx([0.9, 0.5, 0.5])
        and without_training["loss_before"].isna().all()
    )
    assert without_training["took_hold"].all()


def searched(utilities, *, base=0.95, strongest=None):
    """Rates of a search in the order in which they were tried, each with the utility of the unlearned model."""
    trained, ranks = [], dict(PLAIN)
    for rate, utility in utilities.items():
        for role, useful in (("base", 0.9), ("unlearned", utility), ("control", float("nan"))):
            trained.append({"role": role, "variant": rate, "loss_before": 2.0, "loss_after": 0.1, "utility": useful})
        ranks |= attacked(rate, base) | ({("unlearned", rate): 0.6} if rate == strongest else {})
    return result(ranks, trained)


def remark(found):
    shown = pd.DataFrame([{"test": found.test, "variant": found.residual().variant}])
    return remarks(attack_table([found]), shown).get(found.test)


@pytest.mark.parametrize("utility", [1.0, LITTLE, float("nan")])
def test_an_attack_that_leaves_enough_needs_no_remark(utility):
    found = searched({"rate 0.02": utility})
    assert remark(found) is None and tried(attack_table([found])) == {"relearning": "rate 0.02"}


def test_an_attack_that_took_hold_but_wrecked_the_model_is_warned_of_in_words():
    said = remark(searched({"rate 0.02": 0.31}))
    assert said.startswith("The attack (rate 0.02) took hold, but the unlearned model then answers only 31 % of the")
    assert "destroyed what it looks for" in said and said.endswith("Tried: rate 0.02.")


def test_the_variant_whose_residual_is_shown_is_warned_of():
    utilities = {"rate 0.02": 0.4, "rate 0.01": 0.8}
    assert "rate 0.02) took hold, but" in remark(searched(utilities, strongest="rate 0.02"))
    assert remark(searched(utilities, strongest="rate 0.01")) is None
    plain = searched(utilities)
    shown = pd.DataFrame([{"test": plain.test, "variant": ""}])
    assert remarks(attack_table([plain]), shown) == {}  # of the attacked ones, that which leaves most


def test_what_the_base_keeps_is_warned_of_where_a_test_asks_for_little():
    found = searched({"rate 0.02": 0.3}, base=0.65)
    found = replace(found, frame=found.frame, settings={"base_keeps": 0.2})
    assert "retain questions that it answered before and the base keeps only 30 % of its knowledge" in remark(found)
    costly = replace(found, frame=found.frame, settings={"base_keeps": 0.2, "still_useful": 0.1})
    assert "took hold, but the base keeps only 30 % of its knowledge: it may" in remark(costly)


def test_rates_that_did_not_take_hold_are_listed_in_the_order_in_which_they_were_tried():
    found = searched({"rate 0.02": 0.1, "rate 0.01": 0.2, "rate 0.04": 0.9})
    table = attack_table([found])
    assert list(dict.fromkeys(table["variant"])) == ["rate 0.02", "rate 0.01", "rate 0.04"]
    listed = "rate 0.02 (did not take hold), rate 0.01 (did not take hold), rate 0.04"
    assert remark(found) == f"Tried: {listed}."
    nothing = remark(searched({"rate 0.02": 0.1, "rate 0.01": 0.2}))
    assert nothing.startswith("The attack did not take hold at any strength. Tried: rate 0.02 (did not")


def test_variants_without_training_are_not_listed():
    found = result(PLAIN | attacked("30 %", 0.55) | attacked("10 %", 0.9), test="pruning")
    assert tried(attack_table([found])) == {} and remark(found) is None
