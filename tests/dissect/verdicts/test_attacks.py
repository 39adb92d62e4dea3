"""How attacks went, from made-up results."""

import numpy as np
import pandas as pd
import pytest

from dissect.stress.core.result import StressResult, value_rows
from dissect.verdicts.attacks import COLUMNS, attack_table
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
