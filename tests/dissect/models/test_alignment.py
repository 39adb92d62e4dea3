"""Models whose units stand in another order: found, refused, and put back to the bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import load_pair, load_prompts, patch, probe
from dissect.models.alignment import _known, aligned, check_order, find_reordered
from dissect.models.rewriting import rewritten
from dissect.zoo import BUILTIN, question_set
from tests.dissect.stress.constructed import model
from unlearning import InputError

KINDS = ("neurons", "heads", "query heads", "stream order")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.hf.parameters(), other.hf.parameters(), strict=True))


def reordered(seed, *kinds):
    return rewritten(model("demo:npo"), seed=seed, largest=1.0, kinds=kinds)


@pytest.mark.parametrize("name", [name for name in BUILTIN if name.startswith("demo:")])
def test_fine_tuned_models_have_the_bases_order(name):
    """Also RMU, which moves single matrices far, and the control, which was trained apart from the base."""
    assert find_reordered(model("demo:base"), model(name)) == []
    assert aligned(model("demo:base"), model(name)) is model(name)


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_is_found_and_undone_to_the_bit(kind):
    base, moved = model("demo:base"), reordered(1, kind)
    assert [one.kind for one in find_reordered(base, moved)] == [kind]
    with pytest.raises(InputError, match="stand in another order than those of demo:base.*Set `align`"):
        check_order(base, moved)
    back = aligned(base, moved)
    assert same(back, model("demo:npo")) and not same(moved, model("demo:npo"))
    assert back.sha256 == model("demo:npo").sha256
    check_order(base, back)


@settings(max_examples=3, deadline=None)
@given(st.sets(st.sampled_from(KINDS), min_size=1), st.integers(0, 1000))
def test_several_orders_at_once_are_undone(kinds, seed):
    assert same(aligned(model("demo:base"), reordered(seed, *sorted(kinds))), model("demo:npo"))


def test_models_that_have_nothing_in_common_are_not_called_reordered():
    base = model("demo:base")
    assert find_reordered(base, fresh(base)) == []


def fresh(like):
    """A model of another initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        hf = type(like.hf)(like.hf.config).eval()
    return replace(like, name="fresh", hf=hf, sha256="fresh")


def test_patching_and_probing_refuse_another_order_and_agree_once_it_is_undone():
    base, npo, moved = model("demo:base"), model("demo:npo"), reordered(3, "neurons")
    pair = load_pair("demo:base", "demo:npo")
    prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=6)
    broken = replace(pair, base=base, unlearned=moved)
    with pytest.raises(InputError, match="MLP neurons of 8 layers"):
        patch(broken, prompts, sites=["mlp_coef"], control=None, progress=False)
    with pytest.raises(InputError, match="MLP neurons of 8 layers"):
        probe(broken, prompts, control=None, draws=1, progress=False)
    with pytest.raises(InputError, match="MLP neurons of 8 layers"):
        patch(replace(pair, base=base, unlearned=npo), prompts, sites=["mlp_coef"], control=moved, progress=False)
    mended = replace(pair, base=base, unlearned=aligned(base, moved))
    found, wanted = (
        patch(one, prompts, sites=["mlp_coef"], control=None, progress=False).frame["krs"]
        for one in (mended, replace(pair, base=base, unlearned=npo))
    )
    assert found.tolist() == wanted.tolist()


def test_a_pair_is_asked_once():
    base, npo = model("demo:base"), model("demo:npo")
    find_reordered(base, npo)
    found = find_reordered(base, npo)
    found.append("edited")
    assert find_reordered(base, npo) == [] and (base.sha256, npo.sha256) in _known
