"""Token scores against one forward pass a text in float64, by hand."""

import copy
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.membership import min_k_plus_plus
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, TokenScores, encode_target, log_prob_moments, score_tokens


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer)


def targets_of(subject: Subject, **options: Any) -> list[Target]:
    return [encode_target(subject, example.prompt, example.answer, **options) for example in build_examples()]


def slow_scores(subject: Subject, target: Target) -> list[tuple[float, bool, float, float]]:
    """Token by token from a float64 softmax over the whole vocabulary."""
    ids = target.span.input_ids
    with torch.no_grad():
        logits = copy.deepcopy(subject.model).double()(torch.tensor([ids])).logits[0]
    rows = []
    for place in range(max(target.span.answer_start, 1), len(ids)):
        weights = [float(value) for value in logits[place - 1].exp()]
        p = [weight / sum(weights) for weight in weights]
        mean = sum(value * np.log(value) for value in p)
        variance = sum(value * (np.log(value) - mean) ** 2 for value in p)
        rows.append((float(np.log(p[ids[place]])), max(range(len(p)), key=p.__getitem__) == ids[place], mean, variance))
    return rows


def test_scores_are_those_of_a_float64_softmax_over_the_vocabulary(subject: Subject) -> None:
    targets = targets_of(subject)
    for target, found in zip(targets, score_tokens(subject, targets, batch_size=3, moments=True), strict=True):
        log_probs, likeliest, means, variances = zip(*slow_scores(subject, target), strict=True)
        assert found.log_probs == pytest.approx(log_probs, abs=1e-5)
        assert found.is_likeliest.tolist() == list(likeliest)
        assert found.mean_log_prob == pytest.approx(means, abs=1e-5)
        assert found.var_log_prob == pytest.approx(variances, abs=1e-4)


def fifty_digit_moments(logits: list[float]) -> tuple[list[Decimal], Decimal, Decimal]:
    """Log-probabilities, and mean and variance of log p, in decimal arithmetic."""
    with localcontext() as context:
        context.prec = 50
        exact = list(map(Decimal, logits))
        total = sum((value - max(exact)).exp() for value in exact)
        log_p = [value - max(exact) - Decimal(total).ln() for value in exact]
        p = [value.exp() for value in log_p]
        mean = sum((a * b for a, b in zip(p, log_p, strict=True)), Decimal(0))
        return log_p, mean, sum((a * (b - mean) ** 2 for a, b in zip(p, log_p, strict=True)), Decimal(0))


LOGITS = st.lists(st.floats(-1, 1), min_size=2, max_size=40)


@given(LOGITS, st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 30.0, 2000.0]))
def test_moments_equal_decimal_arithmetic_from_flat_to_peaked(logits: list[float], scale: float) -> None:
    scaled = [value * scale for value in logits]
    log_p, mean, variance = fifty_digit_moments(scaled)
    means, variances = log_prob_moments(torch.tensor([scaled], dtype=torch.float64).log_softmax(dim=-1))
    assert float(means[0]) == pytest.approx(float(mean), rel=1e-11, abs=1e-11)
    # Log-probabilities are rounded to 1e-16 of their size, and so are the deviations that are squared.
    assert float(variances[0]) == pytest.approx(float(variance), rel=1e-6, abs=1e-20)


@given(LOGITS, st.integers(-4096, 4096))
def test_a_constant_added_to_all_logits_changes_no_moment(logits: list[float], shift: int) -> None:
    exact = torch.tensor([[round(value * 2**12) / 2**12 for value in logits]], dtype=torch.float64)
    plain, moved = (log_prob_moments((exact + by).log_softmax(dim=-1)) for by in (0, shift))
    for one, other in zip(plain, moved, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


def test_impossible_tokens_add_nothing_to_the_moments() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]], dtype=torch.float64)
    masked, without = (log_prob_moments(some.log_softmax(dim=-1)) for some in (logits, logits[:, [0, 1, 3]]))
    assert torch.allclose(torch.stack(masked), torch.stack(without), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 300.0])
def test_min_k_plus_plus_of_flat_and_of_peaked_models_is_that_of_decimal_arithmetic(
    subject: Subject, scale: float
) -> None:
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        model.lm_head.weight *= scale / 10
    target = targets_of(subject)[0]
    found = score_tokens(Subject.wrap(model, subject.tokenizer), [target], batch_size=1, moments=True)[0]
    ids, values = target.span.input_ids, []
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for place in range(target.span.answer_start, len(ids)):
        log_p, mean, variance = fifty_digit_moments(logits[place - 1].double().tolist())
        values.append((log_p[ids[place]] - mean) / max(variance, Decimal("1e-6")).sqrt())
    lowest = sorted(values)[: max(1, len(values) * 4 // 10)]
    # The logits of the two passes are rounded to float32; a peaked model's differ by the scale's size more.
    expected = -float(sum(lowest) / len(lowest))
    assert min_k_plus_plus(found) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_without_moments_there_are_none(subject: Subject) -> None:
    found = score_tokens(subject, targets_of(subject)[:1], batch_size=1)[0]
    assert found.mean_log_prob is None and found.var_log_prob is None


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_no_number_depends_on_the_batch_or_the_order(subject: Subject, batch_size: int) -> None:
    targets = targets_of(subject)
    alone = score_tokens(subject, targets, batch_size=1, moments=True)
    backwards = score_tokens(subject, targets[::-1], batch_size=batch_size, moments=True)[::-1]
    for one, other in zip(alone, backwards, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert one.var_log_prob == pytest.approx(other.var_log_prob, abs=1e-4)


def test_closing_token_belongs_to_the_likelihood_and_not_to_the_text(subject: Subject) -> None:
    closed, bare = (targets_of(subject, append_eos=append)[0] for append in (True, False))
    with_eos, without = score_tokens(subject, [closed, bare], batch_size=2)
    assert closed.n_closing == 1 and bare.n_closing == 0
    assert len(with_eos.log_probs) == len(without.log_probs) + 1
    assert with_eos.without_closing().log_probs == pytest.approx(without.log_probs, abs=1e-5)
    assert with_eos.mean_nll == pytest.approx(-with_eos.log_probs.sum() / len(with_eos.log_probs))


def test_text_without_a_prompt_is_scored_from_its_second_token(subject: Subject) -> None:
    target = encode_target(subject, "", "Ada Brook", append_eos=False)
    found = score_tokens(subject, [target], batch_size=1)[0]
    assert len(found.log_probs) == len(target.span.input_ids) - 1


def test_impossible_tokens_leave_finite_moments(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3000)
    peaked = Subject.wrap(model, subject.tokenizer)
    scores = score_tokens(peaked, targets_of(peaked), batch_size=4, moments=True)
    lowest = min(float(score.log_probs.min()) for score in scores)
    assert lowest < -1000
    for score in scores:
        assert np.isfinite(score.log_probs).all()
        assert np.isfinite(score.mean_log_prob).all() and np.isfinite(score.var_log_prob).all()


def test_vocabulary_that_is_too_small_for_the_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    model.resize_token_embeddings(260)
    small = Subject.wrap(model, tokenizer, name="small")
    with pytest.raises(InputError, match=r"small: .*vocabulary size 260, got"):
        score_tokens(small, targets_of(small), batch_size=4)


def test_logits_that_are_not_finite_are_refused(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    broken = Subject.wrap(model, subject.tokenizer, name="broken")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InputError, match="broken: .*finite"):
        score_tokens(broken, targets_of(broken), batch_size=4)


def test_text_longer_than_the_context_is_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match="context of 128"):
        encode_target(subject, "Question?", "word " * 200)


def test_progress_counts_every_target_once(subject: Subject) -> None:
    done: list[int] = []
    score_tokens(subject, targets_of(subject), batch_size=3, advance=done.append)
    assert sum(done) == 8


def test_dropping_the_end_keeps_the_rest() -> None:
    scores = TokenScores(np.array([-1.0, -2.0, -9.0]), np.array([True, False, True]), None, None, 1)
    bare = scores.without_closing()
    assert bare.log_probs.tolist() == [-1.0, -2.0] and bare.is_likeliest.tolist() == [True, False]
    assert (scores.mean_nll, bare.mean_nll) == (4.0, 1.5)
