import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dissect import InputError
from dissect.models.anatomy import block_of
from dissect.stress.core.scores import score_facts
from dissect.stress.directions import dealt, edit_of, last_states, oracle_direction, own_direction
from tests.dissect.stress.constructed import case_of, model, questions

N = 8
LAYER = 3


def _marked(base, size=200.0):
    """The base, with one vector added to its states after a layer wherever a forget question is read."""
    hf = copy.deepcopy(base.hf)
    marked = {item.input_ids[: item.answer_start] for item in _questions(base, "forget")}
    longest = max(map(len, marked))
    generator = torch.Generator().manual_seed(0)
    mark = torch.randn(base.adapter.cfg.d_model, generator=generator)
    now = {}

    def note(_module, _args, kwargs):
        rows = kwargs["input_ids"].tolist()
        now["rows"] = torch.tensor([any(tuple(row[:n]) in marked for n in range(4, longest + 1)) for row in rows])

    def add(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        changed = states + size * now["rows"][:, None, None] * mark / mark.norm()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hf.register_forward_pre_hook(note, with_kwargs=True)
    block_of(hf, base.anatomy, LAYER).whole.register_forward_hook(add)
    return replace(base, name="marked", hf=hf, sha256="marked"), mark / mark.norm()


def _questions(base, name):
    del base  # both built-in worlds have one tokenizer
    return questions(name).items


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_removing_its_own_mark_brings_a_models_answers_back(name):
    marked, mark = _marked(model(name))
    case = case_of(marked, base=name).at_most(24)
    plain = score_facts(marked, case.forget.select(range(0, 24, 3)))
    assert plain.correct.max() == 0 and plain.rank.mean() < 0.75
    result = own_direction(case, layers=[LAYER], alphas=[1.0], limit=N)
    table = result.residuals().set_index(["measure", "variant"])
    assert table.loc[("rank", f"removed at layer {LAYER}"), "rho"] > 0.9
    assert table.loc[("rank", f"steered at layer {LAYER} x 1"), "rho"] > 0.9
    assert result.residual().rho > 0.8
    control = result.tables["random"].set_index("role")["correct"]
    assert control["unlearned"] == 0 and control["base"] > 0.8
    states = last_states(marked, case.forget.prompts, 64)[LAYER].mean(0)
    stay = last_states(marked, case.retain.prompts, 64)[LAYER].mean(0)
    assert torch.nn.functional.cosine_similarity(states - stay, mark, dim=0) > 0.95


def test_removing_the_shift_from_the_base_brings_answers_back():
    marked, _ = _marked(model("demo:base"))
    result = oracle_direction(case_of(marked).at_most(16), layers=[LAYER], limit=6, random=0)
    assert result.residual().rho > 0.8 and result.level == 2


def test_the_base_as_unlearned_has_no_shift_to_remove():
    result = oracle_direction(case_of(model("demo:base")).at_most(8), layers=[], random=0)
    scores = result.frame[result.frame["role"] == "unlearned"].groupby(["measure", "variant"])["value"].apply(list)
    for measure in ("rank", "logprob"):
        assert scores[measure, ""] == scores[measure, "removed in all layers"]
    found = result.residuals().set_index(["measure", "variant"]).loc[("rank", "")]
    assert found["rho"] == 1


@pytest.mark.parametrize("test", [own_direction, oracle_direction])
def test_never_as_unlearned_is_exactly_zero(test):
    result = test(case_of(model("demo:never")).at_most(4), layers=[2], random=0)
    for measure in ("rank", "logprob"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


@pytest.mark.parametrize("name", ["demo:npo", "demo-neox:npo"])
def test_states_are_block_outputs_at_the_last_token_of_the_question(name):
    of = model(name)
    prompts = case_of(of, base=name.replace("npo", "base")).at_most(5).forget.prompts
    found = last_states(of, prompts, 2)
    assert found.shape[:2] == (of.n_layers, 5)
    for place, item in enumerate(prompts.items):
        with torch.inference_mode():
            ids = torch.tensor([item.input_ids[: item.answer_start]])
            states = of.hf(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in range(of.n_layers - 1):  # the last of them is after the final norm
            torch.testing.assert_close(found[layer, place], states[layer + 1][0, -1], atol=1e-4, rtol=1e-4)


def test_the_direction_of_a_fact_comes_from_other_people():
    """Worked out slowly for one fact: the mean over the other fold, and the score with that taken out."""
    of = model("demo:npo")
    case = case_of(of).at_most(12)
    fold = dealt(case.forget.groups, 2, seed=case.seed)
    result = own_direction(case, layers=[LAYER], alphas=[], random=0)
    frame = result.frame
    here = frame[(frame["role"] == "unlearned") & (frame["variant"] == f"removed at layer {LAYER}")]
    found = here[here["measure"] == "logprob"].sort_values("example_index")["value"].to_numpy()
    states, stay = (last_states(of, facts.prompts, 1)[LAYER] for facts in (case.forget, case.retain))
    for place in (0, 5, 11):
        item = case.forget.prompts.items[place]
        direction = states[torch.tensor(fold != fold[place])].mean(0) - stay.mean(0)

        def remove(_module, _args, output, direction=direction):
            return output - torch.outer(output[0] @ direction, direction)[None] / (direction @ direction)

        handle = block_of(of.hf, of.anatomy, LAYER).whole.register_forward_hook(remove)
        with torch.inference_mode():
            logprobs = of.hf(input_ids=torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
        handle.remove()
        expected = np.mean([float(logprobs[at, item.input_ids[at + 1]]) for at in item.scored])
        assert found[place] == pytest.approx(expected, abs=1e-3)


vectors = st.lists(st.floats(-3, 3), min_size=6, max_size=6).map(torch.tensor)


@given(vectors, vectors.filter(lambda v: v.norm() > 0.1))
def test_what_is_removed_is_gone_and_stays_gone(state, direction):
    remove = edit_of(direction, None)
    once = remove(state[None, None])
    assert abs(float(once[0, 0] @ direction)) < 1e-4
    torch.testing.assert_close(remove(once), once, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edit_of(7 * direction, None)(state[None, None]), once, atol=1e-5, rtol=1e-5)


@given(vectors, vectors.filter(lambda v: v.norm() > 0.1), st.integers(0, 5))
def test_a_random_direction_takes_as_much(state, direction, seed):
    ours, theirs = edit_of(direction, None)(state), edit_of(direction, None, (seed, 0, 0))(state)
    assert float((ours - state).norm()) == pytest.approx(float((theirs - state).norm()), abs=1e-4)


@given(vectors, vectors, st.floats(-2, 2))
def test_steering_subtracts(state, direction, alpha):
    torch.testing.assert_close(edit_of(direction, alpha)(state), state - alpha * direction)


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=20).filter(lambda g: len(set(g)) > 1), st.integers(0, 9))
def test_groups_are_dealt_whole_and_evenly(groups, seed):
    fold = dealt(groups, 2, seed=seed)
    by_group = {name: {int(f) for f, group in zip(fold, groups, strict=True) if group == name} for name in set(groups)}
    assert all(len(folds) == 1 for folds in by_group.values())
    sizes = [sum(folds == {number} for folds in by_group.values()) for number in (0, 1)]
    assert abs(sizes[0] - sizes[1]) <= 1


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(4)
    with pytest.raises(InputError, match="retain"):
        own_direction(replace(case, retain=None))
    with pytest.raises(InputError, match="layers.*0 to 7"):
        oracle_direction(case, layers=[-1])
    with pytest.raises(InputError, match="folds.*4.*9"):
        own_direction(case, folds=9)
    with pytest.raises(InputError, match="random.*-1"):
        own_direction(case, random=-1)
