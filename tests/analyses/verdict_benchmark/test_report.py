"""What the benchmark makes of the tests' numbers: the rule, rates, words, power; on models invented for it."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from analyses.verdict_benchmark import constructions as making
from analyses.verdict_benchmark import figures as drawing
from analyses.verdict_benchmark import report as reporting
from analyses.verdict_benchmark import write as writing
from analyses.verdict_benchmark.fit_rule import (
    ALONE,
    AT_MOST,
    CANDIDATES,
    LEAST,
    NEEDED,
    fit,
    run_sd_of,
    scale,
    suppressed_above,
)
from analyses.verdict_benchmark.measured import Measured, labelled, largest_residual, rivals
from dissect.stress.core.result import PLAIN, Residual, StressResult
from dissect.verdicts.rule import Rule, RuleEntry, Rules, Score, read_rule
from unlearning import InputError
from unlearning.common.bootstrap import widening

TESTS = ("without_attack", "relearn_disjoint", *map(str, ALONE), *map(str, CANDIDATES))


def residual(rho: float, width: float = 0.02) -> Residual:
    draws = rho + width * np.linspace(-1, 1, 41)
    return Residual(rho, rho - width, rho + width, 100, "lr 1", "control", draws=draws, n_groups=24)


def model(name="m", kind="suppressed", share=None, retain=1.0, forget=0.0, seed=1, uds=0.5, **rhos) -> Measured:
    """A model with these residuals, 0 where none is given."""
    ways = {"erased": making.NEVER_KNEW, "partial": making.PARTLY_TAUGHT + name.rpartition("-")[2]}
    made = ways.get(kind, making.BY_HAND if share == 1 else making.BY_A_METHOD)
    found = {test: residual(rhos.get(test, 0.0)) for test in TESTS}
    return Measured("llama", seed, name, made, kind, share, forget, retain, found, found, {"UDS": uds})


def family(seed: int) -> list[Measured]:
    """Models whose relearning residual is .05 + .8 of what they hold, and whose rounding sees ghosts."""
    generator = np.random.default_rng(seed)

    def noisy(value):
        return value + generator.normal(0, 0.01)

    never = [
        model(
            f"never-order{n}",
            "erased",
            0.0,
            seed=seed,
            relearn_disjoint=noisy(0.05),
            logit_lens=noisy(-0.4),
            quantisation=0.08 * n,
        )
        for n in range(10)
    ]
    part = [
        model(f"part-{s:g}-npo", "partial", s, seed=seed, relearn_disjoint=noisy(0.05 + 0.8 * s), logit_lens=noisy(0.1))
        for s in (0.25, 0.5, 0.75)
    ]
    hidden = [
        model(f"hidden-{n}", "suppressed", 1.0, seed=seed, relearn_disjoint=noisy(0.85), logit_lens=noisy(0.3), uds=0.9)
        for n in range(5)
    ]
    return never + part + hidden


RULE = Rule(
    tests=(RuleEntry("relearn_disjoint"),),
    needed=("relearn_disjoint",),
    floor=0.05,
    ceiling=0.85,
    run_sd=0.0,
    not_unlearned_above=0.5,
    suppressed_above=0.1,
    margin=0.1,
    utility_floor=0.8,
    fitted={},
    reference={},
)

RULES = Rules(RULE, RULE)


def test_the_fit_finds_the_line_between_residual_and_share():
    rule = fit(family(1) + family(2), {"families": ["llama-1", "llama-2"]}).with_control
    assert rule.needed == NEEDED and set(NEEDED) <= set(rule.tests) and RuleEntry("quantisation") not in rule.tests
    assert len(rule.tests) == len(NEEDED) + AT_MOST  # what agrees is taken along
    assert rule.floor == pytest.approx(0.05, abs=0.03) and rule.ceiling == pytest.approx(0.85, abs=0.03)
    assert rule.fitted["models"] == 36 and rule.fitted["error"] < 0.05
    assert rule.fitted["families"] == ["llama-1", "llama-2"]


def test_a_test_that_finds_what_relearning_misses_is_taken():
    models = family(1)
    missed = [
        replace(one, residuals={**one.residuals, "relearn_disjoint": residual(0.05), "linear_probes": residual(0.85)})
        if one.name.startswith("hidden")
        else one
        for one in models
    ]
    assert {*NEEDED, RuleEntry("linear_probes")} <= set(fit(missed, {}).with_control.tests)


def test_the_bound_comes_from_models_that_hold_nothing():
    scores = [Score(0.0, low, low + 0.05, ("relearn_disjoint",), ()) for low in np.linspace(0, 0.06, 21)]
    assert suppressed_above(scores) == pytest.approx(0.12)
    assert suppressed_above([Score(0.0, 0.0, 0.0, (), ())] * 3) == LEAST


def test_the_spread_is_that_of_never_models_and_of_no_others():
    rhos = (0.1, -0.2, 0.05)
    never = [model(f"never-order{n}", "erased", 0.0, relearn_disjoint=rho) for n, rho in enumerate(rhos)]
    damaged = replace(model("never-npo", "erased", 0.0, relearn_disjoint=-0.9), made=making.NEVER_DAMAGED)
    others = [damaged, model("hidden-0", "suppressed", 1.0, relearn_disjoint=0.9)]
    of_people = np.var(residual(0.0).draws) / widening(24) ** 2
    wanted = round(float(np.sqrt(np.mean(np.square(rhos)) - of_people)), 3)
    assert run_sd_of(never + others, (RuleEntry("relearn_disjoint"), RuleEntry("logit_lens"))) == wanted
    assert run_sd_of(never + others, (RuleEntry("logit_lens"),)) == 0.0


@given(st.floats(0.0, 0.3), st.floats(0.5, 1.1))
def test_a_line_without_noise_is_found_to_its_grid(low, high):
    shares = np.linspace(0, 1, 21)
    floor, ceiling = scale(low + (high - low) * shares, shares)
    assert abs(floor - low) <= 0.011 and abs(ceiling - high) <= 0.011


def test_the_largest_residual_leaves_out_tests_without_one():
    one = model(relearn_disjoint=0.2, logit_lens=0.6)
    silent = {**one.residuals, "logit_lens": Residual(None, None, None, 0, "", "control", "no reason")}
    entries = (RuleEntry("relearn_disjoint"), RuleEntry("logit_lens"))
    assert largest_residual(one.residuals, entries) == 0.6
    assert largest_residual(silent, entries) == 0.2


VALUES = st.lists(st.tuples(st.integers(-50, 50).map(lambda n: n / 50), st.booleans()), min_size=4, max_size=30).filter(
    lambda pairs: 0 < sum(holds for _, holds in pairs) < len(pairs)
)


@given(VALUES)
def test_no_threshold_is_better_than_the_best_one(pairs):
    x, holds = (np.array(column) for column in zip(*pairs, strict=True))
    chosen = balanced_accuracy_score(holds, x > reporting.best_threshold(x, holds))
    others = [balanced_accuracy_score(holds, x > t) for t in [*np.unique(x), x.min() - 1]]
    assert chosen >= max(others) - 1e-12


def test_rates_are_those_of_the_report_at_thresholds_of_the_calibration():
    calibration, report = family(1), family(3)
    table = reporting.rates(calibration, report, RULES).set_index("number")
    kept, holds = labelled(report)
    lens = [one.residuals["logit_lens"].rho for one in kept]
    row = table.loc["logit lens" + reporting.NET]
    assert row["auroc"] == pytest.approx(roc_auc_score(holds, lens)) and row["n"] == len(kept) == 15
    assert table.loc["verdict", "auroc"] == 1 and table.loc["verdict", "accuracy"] == 1
    speaking = [replace(one, forget=0.9) if one.name == "hidden-0" else one for one in report]
    silent = [(lens, hold) for one, lens, hold in zip(kept, lens, holds, strict=True) if one.name != "hidden-0"]
    row = reporting.rates(calibration, speaking, RULES).set_index("number").loc["logit lens" + reporting.NET]
    assert row["silent"] == pytest.approx(roc_auc_score([hold for _, hold in silent], [lens for lens, _ in silent]))
    # A threshold that calibration puts in another place is used as it is.
    moved = [replace(one, rivals={"UDS": one.rivals["UDS"] + 1}) for one in calibration]
    assert reporting.rates(moved, report, RULES).set_index("number").loc["UDS", "accuracy"] == 0.5
    uncalibrated = reporting.rates([], report, RULES).set_index("number").loc["UDS"]
    assert np.isnan(uncalibrated["accuracy"]) and np.isnan(uncalibrated["false_alarms"])


def test_the_interval_of_an_auroc_is_that_of_drawn_models():
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.normal(1, 1, 40), generator.normal(0, 1, 30)])
    holds = np.arange(70) < 40
    low, high = reporting._interval(x, holds)
    drawn = []
    for _ in range(500):
        places = np.concatenate([generator.choice(40, 40), 40 + generator.choice(30, 30)])
        drawn.append(roc_auc_score(holds[places], x[places]))
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_a_number_that_some_models_lack_is_rated_on_the_others():
    report = family(3)
    some = [replace(one, rivals={"UDS": float("nan")}) if n == 0 else one for n, one in enumerate(report)]
    assert reporting.rates(family(1), some, RULES).set_index("number").loc["UDS", "n"] == 14


def test_broken_models_are_counted_apart():
    models = [*family(1), model("ga-strong", retain=0.1, relearn_disjoint=0.9)]
    assert len(labelled(models)[0]) == len(labelled(family(1))[0])
    labels = reporting.labels(reporting.judged(models, RULES)).set_index(["made", "state"])
    assert labels.loc[(making.BY_A_METHOD, "broken"), "suppressed"] == 1
    assert labels.loc[(making.NEVER_KNEW, ""), "erased"] == 10
    assert labels.loc[(making.BY_HAND, ""), "suppressed"] == 5
    assert labels["share"].isna().sum() == 1  # what a method leaves is not known


def test_right_labels_and_false_alarms_are_counted():
    models = [
        model("never-order1", "erased", 0.0),
        model("never-order2", "erased", 0.0, relearn_disjoint=0.6),
        model("npo-mild", relearn_disjoint=0.6),
        model("idk-mild", relearn_disjoint=0.9, without_attack=0.9, forget=0.9),
        model("kto-mild", relearn_disjoint=0.0),
        model("dpo-mild", relearn_disjoint=0.13),
    ]
    assert reporting.right_labels(reporting.judged(models, RULES)) == {
        "models": 6,
        "right": 3,
        "inconclusive": 1,
        "erased_called_suppressed": 1,
        "erased": 2,
        "holding_called_erased": 1,
        "holding": 4,
    }


def test_what_is_said_without_a_never_model_rests_on_its_own_residuals():
    ignorant = model("never-1", "erased", 0.0)
    ignorant = replace(ignorant, alone={**ignorant.alone, "relearn_disjoint": residual(0.85)})
    models = [ignorant, model("npo", relearn_disjoint=0.85)]
    frame = reporting.judged(models, RULES)
    assert frame["label"].tolist() == ["erased", "suppressed"]
    assert frame["label without control"].tolist() == ["suppressed", "suppressed"]
    assert frame["score without control"].tolist() == [1.0, 1.0]
    with_it, without = (reporting.right_labels(frame, column=said) for said in ("label", "label without control"))
    assert (with_it["erased_called_suppressed"], without["erased_called_suppressed"]) == (0, 1)
    table = reporting.rates([], models, RULES).set_index("number")
    assert (table.loc[reporting.VERDICT, "auroc"], table.loc[reporting.ALONE, "auroc"]) == (1.0, 0.5)


def test_power_is_the_share_that_is_found_and_least_share_the_smallest_that_holds():
    rows = [
        (0.125, "npo", "erased"),
        (0.25, "npo", "suppressed"),
        (0.5, "npo", "inconclusive"),
        (0.75, "npo", "suppressed"),
        (0.25, "dpo", "suppressed"),
        (0.5, "dpo", "not unlearned"),
    ]
    frame = pd.DataFrame(
        [
            {
                "made": making.PARTLY_TAUGHT + method,
                "kind": "partial",
                "share": share,
                "label": word,
                "score": share,
                "collapsed": False,
            }
            for share, method, word in rows
        ]
    )
    table = reporting.power(frame)
    assert table[table["hidden by"] == "npo"].set_index("share")["found"].to_dict() == {
        0.125: 0.0,
        0.25: 1.0,
        0.5: 0.0,
        0.75: 1.0,
    }
    assert reporting.least_share(table) == {"dpo": 0.25, "npo": 0.75}
    assert (table["found_low"] <= table["found"]).all() and (table["found"] <= table["found_high"]).all()


def test_the_score_is_held_to_the_true_share_where_that_is_known():
    frame = pd.DataFrame(
        {
            "share": [0.0, 0.5, 1.0, None, 1.0],
            "score": [0.1, 0.5, 0.8, 0.9, 0.0],
            "collapsed": [False, False, False, False, True],
        }
    )
    assert reporting.score_error(frame) == pytest.approx(np.sqrt((0.01 + 0 + 0.04) / 3))


def test_rivals_are_means_of_the_unlearned_model_under_the_strongest_attack():
    rows = [
        {"role": role, "variant": variant, "measure": "rank", "example_index": n, "value": value + 0.1 * n}
        for role, variant, value in [
            ("unlearned", PLAIN, 0.8),
            ("unlearned", "lr 1", 0.3),
            ("unlearned", "lr 2", 0.5),
            ("control", "lr 1", 0.9),
        ]
        for n in range(3)
    ]
    frame = pd.DataFrame(rows)
    result = StressResult(
        test="relearn_disjoint", level=4, measure="rank", frame=frame, proves="", settings={}, seconds=0.0
    )
    found = rivals({"relearn_disjoint": result}, cka=0.25)
    assert found["relearning"] == pytest.approx(0.6)  # the model as it was is no attack
    assert found["1 − CKA erasure"] == 0.75 and np.isnan(found["1 − UDS"])
    assert np.isnan(rivals({}, None)["1 − CKA erasure"])
    tests = pd.DataFrame({"role": ["base", "unlearned"], "effect": [0.9, 0.2], "z": [8.0, 2.5]})
    found = rivals({"crossover": replace(result, test="crossover", tables={"permutation": tests})}, None)
    assert found["crossover"] == 0.2 and found["crossover, z"] == 2.5


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(
        writing,
        "read_measured",
        lambda _out, _architectures, seeds, **_kept: [one for seed in seeds for one in family(seed)],
    )


@pytest.mark.usefixtures("measured")
def test_the_report_is_written_and_the_rule_gets_its_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "IN_FIGURE", ("score", "score without control", "UDS", "not measured"))
    rules = writing.write_report(tmp_path, ["llama"], [1, 2], [3], RULES, formats=["html"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("judged.csv", "rates.csv", "moved.csv", "table.md", "figures"),
        *(f"{name}-{with_}-control.csv" for name in ("labels", "power") for with_ in ("with", "without")),
    }
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"scores", "rates", "shares"}
    for rule in (rules.with_control, rules.without_control):
        assert len(rule.reference["erased"]) == 10 and len(rule.reference["partly erased"]) == 3
        assert rule.sha256 == RULE.sha256
    text = (tmp_path / "table.md").read_text()
    assert "erased called suppressed 0" in text and "| verdict | 1 | 1 | 1 | 1 | 1 | 0 | 15 |" in text
    assert "18 of these models written otherwise at random: with a control, 0 labels differ" in text


@pytest.mark.usefixtures("measured")
def test_a_rule_is_fitted_on_the_calibration_families_only(tmp_path):
    rules = writing.fitted_rules(tmp_path, ["llama"], [1, 2])
    writing.write_rules(rules, tmp_path / "rule.json")
    written = json.loads((tmp_path / "rule.json").read_text())
    for name, rule in vars(rules).items():
        assert read_rule(written[name]) == read_rule(json.loads(json.dumps(rule.record())))
    with pytest.raises(InputError, match="neox-1, neox-2 were not tested"):
        writing.fitted_rules(tmp_path, ["llama", "neox"], [1, 2])


def test_the_seeds_of_calibration_and_report_have_nothing_in_common():
    from analyses.verdict_benchmark.command import CALIBRATION, QUICK_SEED, REPORT

    assert not set(CALIBRATION) & {*REPORT, QUICK_SEED}


def test_figures_show_every_model_and_number():
    frame = reporting.judged(family(3), RULES)
    scores = drawing.scores_figure(frame, RULE, numbers=("score", "UDS"))
    assert sum(len(trace.x) for trace in scores.data) == 2 * 15
    table = reporting.rates(family(1), family(3), RULES)
    assert sum(len(trace.x) for trace in drawing.rates_figure(table).data) == len(table)
    shares = drawing.shares_figure(reporting.power(frame))
    assert {trace.name for trace in shares.data if trace.name} >= {"npo", making.BY_HAND, reporting.NOTHING}
