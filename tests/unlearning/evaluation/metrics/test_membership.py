"""Membership scores and their AUC against loops over pairs, tokens and the whole vocabulary."""

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning.evaluation.metrics import membership
from unlearning.evaluation.metrics.membership import (
    auc,
    control_likeness,
    detection_rate,
    loss_ratio,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    zlib_score,
)
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import TokenScores, encode_target, score_tokens

SCORES = st.lists(st.sampled_from([-1e7, -2.0, 0.0, 0.5, 0.5000001, 1.0, 1e4, float("inf")]), min_size=1, max_size=9)


def once(statistic, forget: Sequence[float], holdout: Sequence[float], **options: float) -> float:  # type: ignore[no-untyped-def]
    """The statistic of the rows themselves."""
    ones = np.ones((1, len(forget))), np.ones((1, len(holdout)))
    return float(statistic(np.array(forget), np.array(holdout), *ones, **options)[0])


def slow_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    pairs = [(f, h) for f in forget for h in holdout]
    return sum(1.0 if h > f else 0.5 if h == f else 0.0 for f, h in pairs) / len(pairs)


def slow_rate(forget: Sequence[float], holdout: Sequence[float], false_alarms: float) -> float:
    best = 0.0
    for threshold in forget:
        if sum(h <= threshold for h in holdout) <= false_alarms * len(holdout):
            best = max(best, sum(f <= threshold for f in forget) / len(forget))
    return best


@given(forget=SCORES, holdout=SCORES)
@settings(max_examples=150)
def test_auc_counts_pairs(forget: list[float], holdout: list[float]) -> None:
    found = once(auc, forget, holdout)
    assert found == pytest.approx(slow_auc(forget, holdout), abs=1e-12)
    assert found + once(auc, holdout, forget) == pytest.approx(1)  # exchanging the sets turns it round
    u = mannwhitneyu(holdout, forget).statistic
    assert found == pytest.approx(u / len(forget) / len(holdout), abs=1e-12)


@given(forget=SCORES, holdout=SCORES, seed=st.integers(0, 99))
@settings(max_examples=60)
def test_weights_count_rows_as_often_as_they_were_drawn(forget: list[float], holdout: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = [rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=3) for rows in (forget, holdout)]
    arrays, weights = [np.array(forget), np.array(holdout)], [draws.astype(float) for draws in times]
    for statistic, slow in ((auc, slow_auc), (_rate, lambda f, h: slow_rate(f, h, 0.3))):
        found = statistic(*arrays, *weights)
        for draw in range(3):
            drawn = [np.repeat(rows, counts[draw]).tolist() for rows, counts in zip(arrays, times, strict=True)]
            assert found[draw] == pytest.approx(slow(*drawn), abs=1e-12)


def _rate(*arguments: np.ndarray) -> np.ndarray:
    return detection_rate(*arguments, false_alarms=0.3)


@pytest.mark.parametrize(
    ("forget", "holdout", "expected"),
    [
        ([1.0, 1.1], [2.0, 3.0, 4.0], 1.0),  # memorised
        ([9.0, 8.0], [2.0, 3.0, 4.0], 0.0),  # over-forgotten
        ([5.0] * 4, [5.0] * 3, 0.5),  # all equal
        ([1.0, 3.0], [1.0, 2.0], 0.375),  # one pair above, one tie, of four
        ([1e7, 1e7 + 1], [1e7 + 2], 1.0),  # collapsed, and still told apart
        ([2.0], [1.0], 0.0),
    ],
)
def test_auc_of_rows_made_by_hand(forget: list[float], holdout: list[float], expected: float) -> None:
    assert once(auc, forget, holdout) == expected


def test_detection_rate_allows_no_more_false_alarms_than_it_says() -> None:
    holdout = [float(score) for score in range(1, 101)]
    assert once(detection_rate, [0.5, 1.5, 2.5, 0.1], holdout, false_alarms=0.01) == 0.75
    assert once(detection_rate, [0.5, 1.5, 2.5, 0.1], holdout, false_alarms=0.0) == 0.5
    assert once(detection_rate, [200.0, 300.0], holdout, false_alarms=0.01) == 0.0
    assert once(detection_rate, [1.0, 1.0], [1.0] * 100, false_alarms=0.01) == 0.0  # all equal: all or none


def test_min_k_is_the_mean_of_the_lowest_share() -> None:
    rng = np.random.default_rng(0)
    for n in (*range(1, 40), 100):
        log_probs = -rng.exponential(size=n)
        for percent in (5, 20, 29, 40, 100):
            ordered = sorted(log_probs.tolist())
            lowest = ordered[: max(1, n * percent // 100)]
            expected = -sum(lowest) / len(lowest)
            assert min_k(log_probs, fraction=percent / 100) == pytest.approx(expected, abs=1e-12), (n, percent)


def test_min_k_of_one_token_and_of_a_collapse() -> None:
    assert min_k(np.array([-3.0])) == 3.0
    assert min_k(np.array([-1e4, -1e4, -2e4, 0.0, 0.0])) == 1.5e4


def test_min_k_plus_plus_standardises_by_moments_over_the_whole_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    subject = Subject.wrap(build_tiny_llama().double(), tokenizer)
    for example in build_examples(4):
        target = encode_target(subject, example.prompt, example.answer)
        ids, start = target.span.input_ids, target.span.answer_start
        with torch.no_grad():
            log_p = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1).numpy()
        standardised = []
        for position in range(start, len(ids) - 1):  # without the end of sequence
            row = log_p[position - 1]
            mean = sum(np.exp(value) * value for value in row)
            variance = sum(np.exp(value) * (value - mean) ** 2 for value in row)
            standardised.append((row[ids[position]] - mean) / max(variance, 1e-6) ** 0.5)
        lowest = sorted(standardised)[: max(1, int(len(standardised) * 0.4))]
        (scores,) = score_tokens(subject, [target], batch_size=1, moments=True)
        assert min_k_plus_plus(scores.without_closing()) == pytest.approx(-np.mean(lowest), rel=1e-5)


def test_min_k_plus_plus_of_a_model_that_is_sure_is_finite() -> None:
    log_probs, zeros = np.array([-1e4, 0.0]), np.zeros(2)
    scores = TokenScores(log_probs, np.array([False, True]), zeros, zeros, 0)
    assert min_k_plus_plus(scores) == pytest.approx(1e4 / 1e-3)
    with pytest.raises(ValueError, match="moments=True"):
        min_k_plus_plus(TokenScores(log_probs, np.array([False, True]), None, None, 0))


def test_zlib_and_ratio() -> None:
    text = "Ada Brook was born in Oslo. " * 4 + "é"
    assert zlib_score(3.0, text) == 3.0 / len(zlib.compress(bytes(text, "utf-8")))
    assert loss_ratio(3.0, 4.0) == 0.75
    assert loss_ratio(0.0, 0.0) == 1.0
    assert loss_ratio(1.0, 0.0) == float("inf")


PUBLISHED = {"News": (0.4772, 109.6), "Books": (0.5393, 85.4)}


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_privacy_leakage_has_the_published_ceilings(corpus: str) -> None:
    retain, ceiling = (np.array([value]) for value in PUBLISHED[corpus])
    assert privacy_leakage(np.array([1.0]), retain)[0] == pytest.approx(ceiling[0], abs=0.05)
    assert privacy_leakage(np.array([1.0]), retain)[0] == pytest.approx(100 * (1 - retain[0]) / retain[0])
    assert privacy_leakage(np.array([0.0]), retain)[0] == -100
    assert privacy_leakage(retain, retain)[0] == 0


def test_retain_likeness_is_one_at_the_retain_models_auc_and_never_below_zero() -> None:
    ours, theirs = np.array([0.6, 0.3, 0.9, 1.0]), np.array([0.6, 0.6, 0.6, 0.2])
    assert control_likeness(ours, theirs) == pytest.approx([1.0, 0.5, 0.5, 0.0])


def test_the_share_is_muses() -> None:
    assert membership.FRACTION == 0.4
