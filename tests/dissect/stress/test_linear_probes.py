from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from dissect import InputError
from dissect.stress.linear_probes import Answers, Split, best_alpha, class_ranks, linear_probes, probe_ranks, ridge
from tests.dissect.stress.constructed import case_of, gated, model

N = 60


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 8), (12, 30)])
def test_ridge_is_scikit_learns(shape):
    features, targets = _normal(*shape), _normal(shape[0], 3, seed=1)
    for alpha, weights in zip((0.5, 20.0), ridge(features, targets, (0.5, 20.0)), strict=True):
        expected = Ridge(alpha, fit_intercept=False).fit(features.double().numpy(), targets.double().numpy()).coef_.T
        np.testing.assert_allclose(weights.numpy(), expected, atol=1e-5)


def test_more_noise_asks_for_a_stronger_ridge():
    features, true, groups = _normal(60, 30), _normal(30, 4, seed=1), np.arange(60) // 3
    assert best_alpha(features, features @ true, groups) == 1.0
    assert best_alpha(features, 100 * _normal(60, 4, seed=2), groups) == 1000.0


def _states(case, *, knows, seed=0, noise=0.0):
    """Made-up states: a fixed linear image of the answer's embedding, or of nothing."""
    split = Split.of(case, 3)
    answers = Answers.of(case.pair.base, case.forget, split.prompts)
    width = answers.right.shape[1]
    states = answers.right @ _normal(width, width, seed=7) if knows else torch.zeros(len(answers.right), width)
    return split, answers, states + (noise if knows else 1.0) * _normal(len(answers.right), width, seed=seed)


def test_a_linear_code_of_the_answer_is_found_and_noise_is_not():
    case = case_of(model("demo:base"), n=N)
    split, answers, states = _states(case, knows=True)
    order = np.random.default_rng(0).permutation(len(split.prompts))
    (found,) = probe_ranks(states, [states], answers, split, order)
    assert found[0].mean() > 0.97
    assert abs(found[1].mean() - 0.5) < 0.1  # fitted to other facts' answers it knows no more than chance
    split, answers, nothing = _states(case, knows=False)
    means = []
    for seed in range(3):
        nothing = _states(case, knows=False, seed=seed)[2]
        means.append(probe_ranks(nothing, [nothing], answers, split, order)[0][0].mean())
    assert abs(np.mean(means) - 0.5) < 0.06


def test_constant_states_are_exactly_at_the_floor():
    case = case_of(model("demo:base"), n=N)
    split, answers, _ = _states(case, knows=False)
    constant = _normal(1, 12).expand(len(split.prompts), 12)
    (found,) = probe_ranks(constant, [constant], answers, split, np.arange(len(split.prompts)))
    np.testing.assert_array_equal(found, 0.5)


def test_nobody_is_asked_by_a_probe_that_was_fitted_on_them():
    case = case_of(model("demo:base"), n=N)
    split = Split.of(case, 4)
    n = len(case.forget)
    asked = np.concatenate([test for _, test in split.folds])
    assert sorted(asked) == list(range(n)) and len(split.folds) == 4
    for train, test in split.folds:
        assert not {split.groups[place] for place in train} & {split.groups[place] for place in test}
        assert set(range(n, len(split.prompts))) <= set(train)
    # Retain facts of a forget person would give T a look at V.
    overlapping = replace(case, retain=case.forget)
    assert len(Split.of(overlapping, 4).prompts) == n


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_what_a_gate_hides_in_the_last_layer_is_probed_before_it(name):
    shut, gate = gated(name)
    result = linear_probes(case_of(shut, base=name, n=N), layers=[gate.layer - 1], folds=3)
    found = result.residual()
    assert found.rho == pytest.approx(1, abs=0.02) and found.low > 0.9
    table = result.tables["probes"].set_index(["role", "probe"])["rank"]
    assert table["base", f"own probe, layer {gate.layer - 1}"] > 0.8
    assert abs(table["control", f"own probe, layer {gate.layer - 1}"] - 0.5) < 0.13
    for role in ("base", "unlearned", "control"):  # all questions end in the same token
        assert table[role, "own probe, embeddings"] == 0.5


def test_never_and_base_as_unlearned_are_exactly_zero_and_one():
    for name, rho in (("demo:never", 0), ("demo:base", 1)):
        result = linear_probes(case_of(model(name), n=20), layers=[5], folds=2)
        assert result.residual().rho == result.residual().low == result.residual().high == rho
    alone = linear_probes(replace(case_of(model("demo:base"), n=20), control=None), layers=[5], folds=2).residual()
    assert alone.rho is None and "without a control" in alone.reason


def _few_classes(n=60):
    """Facts of a known kind: three answers, one wrong answer each."""
    case = case_of(model("demo:base"), n=n)
    names = np.random.default_rng(0).integers(0, 3, size=2 * n)
    items = [
        replace(item, answer=f"class {name}")
        for item, name in zip((*case.forget.prompts.items, *case.retain.prompts.items), names, strict=False)
    ]
    forget, retain = items[: len(case.forget)], items[len(case.forget) :]
    wrong = tuple((replace(item, answer=f"class {(int(item.answer[-1]) + 1) % 3}"),) for item in forget)
    facts = replace(case.forget, prompts=replace(case.forget.prompts, items=tuple(forget)), distractors=wrong)
    others = replace(case.retain, prompts=replace(case.retain.prompts, items=tuple(retain)))
    return replace(case, forget=facts, retain=others)


def test_few_classes_are_told_apart_by_a_classifier():
    case = _few_classes()
    split = Split.of(case, 2)
    assert split.is_classification and not Split.of(case_of(model("demo:base"), n=N), 5).is_classification
    of_class = np.array([int(item.answer[-1]) for item in split.prompts.items])
    noise = np.random.default_rng(1).normal(size=(len(of_class), 6))
    assert abs(np.nanmean(class_ranks(noise, case.forget, split)) - 0.5) < 0.2
    noise[:, 2] += 6.0 * of_class
    noise[:, 4] += 6.0 * (of_class == 1)
    assert np.nanmean(class_ranks(noise, case.forget, split)) > 0.97


@pytest.mark.slow
def test_a_classifier_stands_beside_the_regression_where_classes_are_few():
    result = linear_probes(_few_classes(), layers=[0], folds=2)
    assert "classifier, layer 0" in set(result.frame["variant"]) and not result.notes


def test_a_class_that_was_never_seen_has_no_value():
    case = _few_classes()
    items = list(case.forget.prompts.items)
    alone = items[0].group
    items = [replace(item, answer="class 9") if item.group == alone else item for item in items]
    facts = replace(case.forget, prompts=replace(case.forget.prompts, items=tuple(items)))
    split = Split.of(replace(case, forget=facts), 2)
    found = class_ranks(np.random.default_rng(0).normal(size=(len(split.prompts), 3)), facts, split)
    np.testing.assert_array_equal(np.isnan(found), [item.group == alone for item in items])


def test_bad_input():
    case = case_of(model("demo:npo"), n=N)
    with pytest.raises(InputError, match="layers.*0 to 6"):
        linear_probes(case, layers=[7])
    with pytest.raises(InputError, match="folds.*cannot be split into 5"):
        linear_probes(replace(case, forget=case.forget.select([0, 1])))
