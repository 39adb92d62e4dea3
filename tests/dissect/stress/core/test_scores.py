from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.stress.core.case import spread
from dissect.stress.core.distractors import Facts, with_distractors
from dissect.stress.core.edits import outputs_edited
from dissect.stress.core.prompts_once import score_with_prompts_once
from dissect.stress.core.scores import chance_accuracy, ranks, score_answers, score_facts
from dissect.stress.directions import edit_of
from dissect.stress.rewording import given_prefix
from tests.dissect.families import build
from tests.dissect.helpers import build_model, build_prompts, build_tokenizer
from tests.dissect.stress.constructed import case_of, model, questions


@pytest.fixture(scope="module")
def facts():
    some = case_of(model("demo:base"), n=12).forget
    return Facts(some.prompts, tuple(wrong[:4] for wrong in some.distractors))


def _slowly(of, item):
    """Mean log-probability and whether all tokens are the likeliest: one text, token by token."""
    with torch.inference_mode():
        logits = of.hf(input_ids=torch.tensor([item.input_ids])).logits[0].double()
    total, likeliest = 0.0, True
    for position in item.scored:
        token = item.input_ids[position + 1]
        total += float(logits[position].log_softmax(-1)[token])
        likeliest &= int(logits[position].argmax()) == token
    return total / len(item.scored), float(likeliest)


def _are_slow_ones(scores, of, facts):
    for place, item in enumerate(facts.prompts.items):
        logprob, likeliest = _slowly(of, item)
        wrong = [_slowly(of, other)[0] for other in facts.distractors[place]]
        assert scores.logprob[place] == pytest.approx(logprob, abs=1e-4)
        assert scores.correct[place] == likeliest
        assert scores.rank[place] == np.mean([logprob > other for other in wrong])
        assert scores.accuracy[place] == (logprob > max(wrong))


def _once(of, facts, batch_size=3):
    asked = [(item, *wrong) for item, wrong in zip(facts.prompts.items, facts.distractors, strict=True)]
    return score_with_prompts_once(of, asked, pad_token_id=facts.prompts.pad_token_id, batch_size=batch_size)


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_scores_are_those_of_one_text_at_a_time(facts, name):
    assert _once(model(name), facts) is not None
    _are_slow_ones(score_facts(model(name), facts, batch_size=7), model(name), facts)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "opt", "falcon"])
def test_prompts_run_once_in_other_architectures_too(family, tmp_path):
    # Mistral and Gemma 2 have windows of four tokens here, less than the prompts.
    facts = with_distractors(build_prompts(tmp_path), n=3)
    of = Model.wrap(build_model(family), build_tokenizer(), name=family)
    of.hf(torch.tensor([[1]]), output_hidden_states=True)  # leaves hooks on the model, which only record
    assert _once(of, facts) is not None
    _are_slow_ones(score_facts(of, facts, batch_size=3), of, facts)


@pytest.mark.parametrize("name", ["bloom", "mpt", "the first gpt"])
def test_a_model_without_positions_or_without_a_cache_runs_whole_texts(name, tmp_path):
    facts = with_distractors(build_prompts(tmp_path), n=3)
    of = Model.wrap(build(name), build_tokenizer(), name=name)
    assert of.takes_position_ids == (name == "the first gpt")
    assert _once(of, facts) is None
    _are_slow_ones(score_facts(of, facts, batch_size=3), of, facts)


def test_a_model_whose_cache_misleads_it_runs_whole_texts(facts):
    class Forgetful(type(model("demo:base").hf)):
        def forward(self, **inputs):
            if inputs.get("past_key_values") is not None:
                inputs["position_ids"] = inputs["position_ids"] + 1
            return super().forward(**inputs)

        forward.__signature__ = signature(type(model("demo:base").hf).forward)

    hf = Forgetful(model("demo:base").hf.config).eval()
    hf.load_state_dict(model("demo:base").hf.state_dict())
    of = replace(model("demo:base"), hf=hf)
    assert abs(_once(of, facts)[0] - _once(model("demo:base"), facts)[0]).max() > 0.1
    expected = score_facts(model("demo:base"), facts)
    np.testing.assert_allclose(score_facts(of, facts).logprob, expected.logprob, atol=1e-5)


def test_hooks_see_whole_texts(facts):
    of, seen = model("demo:base"), []
    lengths = {len(item.input_ids) for answers in (facts.prompts.items, *facts.distractors) for item in answers}

    def note(_module, _args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    handle = of.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        score_facts(of, facts, batch_size=1)
    finally:
        handle.remove()
    assert set(seen) == lengths and len(seen) == 5 * len(facts)


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_hooks_on_single_positions_see_parts_of_texts(facts, name):
    of = model(name)
    generator = torch.Generator().manual_seed(0)
    edit = edit_of(torch.randn(of.adapter.cfg.d_model, generator=generator), None)
    edits = {block_of(of.hf, of.anatomy, layer).whole: edit for layer in (1, 4)}
    with outputs_edited(edits):
        assert _once(of, facts) is None
        expected = score_facts(of, facts)
    with outputs_edited(edits, pointwise=True):
        assert _once(of, facts) is not None
        found = score_facts(of, facts)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-4)
    np.testing.assert_array_equal(found.rank, expected.rank)
    assert abs(found.logprob - score_facts(of, facts).logprob).max() > 0.01


def test_answers_that_begin_alike_share_that_too(facts):
    """With a prefix of every answer given, what is scored begins after the tokens that all of them share."""
    asked = [given_prefix(one, 1) for one in zip(facts.prompts.items, facts.distractors, strict=True)]
    asked = [one for one in asked if one is not None]
    some = Facts(replace(facts.prompts, items=tuple(item for item, _ in asked)), tuple(wrong for _, wrong in asked))
    assert len(some) > 3 and _once(model("demo:base"), some) is not None
    _are_slow_ones(score_facts(model("demo:base"), some, batch_size=4), model("demo:base"), some)


def test_facts_without_wrong_answers_have_no_rank(facts):
    alone = Facts(facts.prompts, tuple(() for _ in facts.distractors))
    found, expected = (score_facts(model("demo:npo"), some) for some in (alone, facts))
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    assert np.isnan(found.rank).all()


def test_batches_change_nothing(facts):
    one, many = (score_facts(model("demo:npo"), facts, batch_size=size) for size in (1, 64))
    np.testing.assert_allclose(one.logprob, many.logprob, atol=1e-5)
    np.testing.assert_array_equal(one.rank, many.rank)


def test_the_base_knows_and_the_never_model_guesses():
    facts = case_of(model("demo:base"), n=240).forget
    base, never = score_facts(model("demo:base"), spread(facts, 80)), score_facts(model("demo:never"), facts)
    assert base.rank.mean() > 0.99 and base.correct.mean() > 0.95
    # 40 people: nearly two standard errors of a mean of ranks, each with a standard deviation of 1/sqrt(12).
    assert abs(never.rank.mean() - 0.5) < 0.06 and never.correct.mean() < 0.06


def test_ranks_by_hand():
    found = ranks(np.array([1.0, 2.0, 0.0]), np.array([0.5, 1.0, 3.0, 2.0]), [3, 1, 0])
    np.testing.assert_allclose(found[:2], [0.5, 0.5])
    assert np.isnan(found[2])


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 5))
def test_ranks_are_the_share_of_beaten_ones(wrong, right):
    found = ranks(np.full(len(wrong), float(right)), np.concatenate(wrong).astype(float), [len(w) for w in wrong])
    expected = [np.mean([1.0 if w < right else 0.5 if w == right else 0.0 for w in of_fact]) for of_fact in wrong]
    np.testing.assert_allclose(found, expected)


def test_no_answers_at_all_is_no_error():
    prompts = questions("forget")
    logprob, correct = score_answers(model("demo:base"), prompts, [])
    assert len(logprob) == len(correct) == 0


def test_guessing_is_right_once_in_as_many_as_there_are_answers(facts):
    assert chance_accuracy(facts) == pytest.approx(1 / 5)
    some = Facts(facts.prompts, ((), facts.distractors[1][:1], *facts.distractors[2:]))
    assert chance_accuracy(some) == pytest.approx((1 / 2 + 10 / 5) / 11)


def test_a_fact_without_wrong_answers_has_neither_rank_nor_accuracy(facts):
    scores = score_facts(model("demo:npo"), Facts(facts.prompts, ((), *facts.distractors[1:])))
    assert np.isnan(scores.rank[0]) and np.isnan(scores.accuracy[0]) and not np.isnan(scores.accuracy[1:]).any()
