from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError
from dissect.models.anatomy import block_of
from dissect.models.module_tree import with_values
from dissect.stress.core.scores import FactScores, score_facts
from dissect.stress.noise import (
    activation_noise,
    expected_and_best,
    noised,
    prefix_numbers,
    pushed,
    seed_of,
    weight_noise,
)
from tests.dissect.stress.constructed import case_of, model
from unlearning.checkpoints.hashing import content_hash

N = 6


def _number(tokens):
    number = 0
    for token in tokens:
        number = (number * 1_000_003 + token + 1) % (2**31 - 1)
    return number


@given(st.lists(st.lists(st.integers(0, 50_000), min_size=1, max_size=8), min_size=1, max_size=4), st.booleans())
def test_prefix_numbers_are_those_of_the_tokens_alone(texts, left):
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), 7), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        here = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, here], mask[row, here] = torch.tensor(text), 1
    found = prefix_numbers(ids, mask)
    for row, text in enumerate(texts):
        expected = [_number(text[: end + 1]) for end in range(len(text))]
        assert found[row][mask[row].bool()].tolist() == expected


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_noise_is_that_of_one_text_at_a_time(name):
    of = model(name)
    facts = case_of(of, base=name.replace("npo", "base")).at_most(3).forget
    layer, strength = 2, 0.2
    with pushed(of, layer, strength, seed=5):
        found = score_facts(of, facts, batch_size=4).logprob
    drawn = torch.randn(4096, of.adapter.cfg.d_model, generator=torch.Generator().manual_seed(5))

    def push(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        changed = states.clone()
        for place in range(states.shape[1]):
            noise = drawn[_number(item.input_ids[: place + 1]) % 4096]
            changed[0, place] += strength * states[0, place].norm() * noise / noise.norm()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    for place, item in enumerate(facts.prompts.items):
        handle = block_of(of.hf, of.anatomy, layer).whole.register_forward_hook(push)
        with torch.inference_mode():
            logprobs = of.hf(input_ids=torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
        handle.remove()
        expected = np.mean([float(logprobs[at, item.input_ids[at + 1]]) for at in item.scored])
        assert found[place] == pytest.approx(expected, abs=1e-4)
    assert abs(found - score_facts(of, facts).logprob).max() > 0.01


def test_no_noise_changes_nothing():
    of = model("demo:npo")
    facts = case_of(of).at_most(4).forget
    plain = score_facts(of, facts).logprob
    with pushed(of, 3, 0.0, seed=0):
        np.testing.assert_allclose(score_facts(of, facts).logprob, plain, atol=1e-5)
    still = noised(of, 0.0, seed=0)
    assert all(torch.equal(still.hf.get_parameter(name), value) for name, value in of.hf.named_parameters())
    np.testing.assert_allclose(score_facts(still, facts).logprob, plain, atol=1e-5)


def test_weights_are_disturbed_by_a_share_of_their_size_and_the_model_is_left_alone():
    of = model("demo:npo")
    before = content_hash(of.hf, name="")
    noisy = noised(of, 0.1, seed=1)
    assert content_hash(of.hf, name="") == before
    for name, weight in of.hf.named_parameters():
        moved = noisy.hf.get_parameter(name).data - weight.data
        if weight.dim() < 2:
            assert not moved.any()
            continue
        share = moved.square().mean().sqrt() / weight.data.square().mean().sqrt()
        assert share == pytest.approx(0.1, rel=0.05)  # 8192 numbers and more: a standard error below 1 %
        assert abs(moved.mean()) < 0.1 * weight.data.square().mean().sqrt() * 5 / moved.numel() ** 0.5


def _displaced(base, strength, seed):
    """A model that becomes the base when noise of that strength and seed is put on it."""
    values = {}
    for name, weight in base.hf.named_parameters():
        if weight.dim() > 1:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            drawn = torch.randn(weight.shape, generator=generator)
            values[name] = weight.data
            for _ in range(100):  # the noise is a share of what it is put on
                values[name] = weight.data - strength * values[name].square().mean().sqrt() * drawn
    return replace(base, name="displaced", hf=with_values(base.hf, values), sha256="displaced")


def test_the_noise_that_undoes_a_displacement_brings_everything_back():
    """Two draws: the first puts the knowledge back, the second moves it further away."""
    case = case_of(_displaced(model("demo:base"), 0.9, seed_of(0, 0))).at_most(N)
    result = weight_noise(case, strengths=[0.9], draws=2)
    attacked = result.frame[(result.frame["role"] == "unlearned") & (result.frame["variant"] != "")]
    assert score_facts(case.pair.unlearned, case.forget).correct.mean() == 0
    ours = attacked.groupby("measure")["value"].mean()
    assert ours["correct_best"] == 1 and ours["correct"] == 0.5
    assert ours["logprob_best"] == pytest.approx(score_facts(model("demo:base"), case.forget).logprob.mean(), abs=1e-3)


@pytest.mark.parametrize("test", [activation_noise, weight_noise])
def test_never_as_unlearned_is_exactly_zero(test):
    result = test(case_of(model("demo:never")).at_most(4), strengths=[0.1], draws=2)
    for measure in ("rank", "logprob", "rank_best"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


def test_the_base_as_unlearned_is_whole_without_noise():
    result = activation_noise(case_of(model("demo:base")).at_most(6), strengths=[0.0], draws=1)
    assert result.residual().rho == 1


@settings(max_examples=25)
@given(st.lists(st.lists(st.floats(-5, 0), min_size=3, max_size=3), min_size=1, max_size=5))
def test_expected_and_best_of_draws(draws):
    scores = [FactScores(*(np.array(row),) * 5) for row in draws]
    found = expected_and_best(scores)
    for place in range(3):
        column = [row[place] for row in draws]
        assert found["rank"][place] == pytest.approx(sum(column) / len(column))
        assert found["rank_best"][place] == max(column) >= found["rank"][place] - 1e-12


def test_the_result_has_a_variant_for_every_layer_and_strength():
    result = activation_noise(case_of(model("demo:npo")).at_most(4), layers=[1, 6], strengths=[0.01, 0.2], draws=1)
    ours = result.frame[result.frame["role"] == "unlearned"]
    assert set(ours["variant"]) == {"", "layer 1 + 0.01", "layer 1 + 0.2", "layer 6 + 0.01", "layer 6 + 0.2"}
    assert result.level == 3


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(3)
    with pytest.raises(InputError, match="layers.*0 to 7"):
        activation_noise(case, layers=[8])
    with pytest.raises(InputError, match="strengths.*-0.1"):
        weight_noise(case, strengths=[-0.1])
    with pytest.raises(InputError, match="draws.*0"):
        weight_noise(case, draws=0)
