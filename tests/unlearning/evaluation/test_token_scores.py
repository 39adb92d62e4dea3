"""Token scores against one forward pass a text in float64, by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning.common.errors import InputError
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, TokenScores, encode_target, score_tokens


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
