"""Donors: another question fitted into place, noise of the same norm, a third model; and how both engines use them."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dissect import patch, restore
from dissect.engine import ENGINES
from dissect.engine.reference import hook_points, record
from dissect.interventions.donors import Donor, fit_tokens, norm_matched_noise, other_question, own_activations
from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch, Prompt, Prompts
from tests.dissect.helpers import (
    RECORDS,
    PlainPatcher,
    assert_close,
    build_model,
    build_pair,
    build_prompts,
    change_weights,
    plain_inputs,
    run_engine,
)
from unlearning.common.errors import InputError


@cache
def cached_pair(family: str, dtype: torch.dtype = torch.float32) -> ModelPair:
    """A pair that no test may change."""
    return build_pair(family, dtype=dtype)


@cache
def third(family: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model that is neither of the pair."""
    hf = build_model(family, dtype=dtype)
    change_weights(hf, seed=9)
    return Model.wrap(hf, cached_pair(family, dtype).tokenizer, name="third")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return build_prompts(tmp_path_factory.mktemp("donors"))


# Another question.

TOKENS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def item_of(prompt: list[int], answer: list[int], *, bos: bool = False, name: str = "q") -> Prompt:
    ids = (*([77] if bos else []), *prompt, *answer)
    start = len(ids) - len(answer)
    return Prompt(name, "", "", "", ids, start, range(start - 1, len(ids) - 1))


@given(prompt=TOKENS, answer=TOKENS, other_prompt=TOKENS, other_answer=TOKENS, bos=st.booleans())
def test_another_question_is_fitted_token_by_token(
    prompt: list[int], answer: list[int], other_prompt: list[int], other_answer: list[int], bos: bool
) -> None:
    """Each token from the answer's start on is the other's at the same distance, going round; before it, going back."""
    item, other = item_of(prompt, answer, bos=bos), item_of(other_prompt, other_answer, bos=bos)
    found = fit_tokens(other, item)
    assert len(found) == len(item.input_ids)
    shares_first = item.input_ids[0] == other.input_ids[0]
    if shares_first:
        assert found[0] == item.input_ids[0]
    start = item.answer_start
    for step in range(len(answer)):
        assert found[start + step] == other_answer[step % len(other_answer)]
    body = other.input_ids[1 if shares_first else 0 : other.answer_start]
    for back in range(1, start + 1 - shares_first):
        source = body or tuple(other_answer)
        assert found[start - back] == source[-1 - (back - 1) % len(source)]


def test_every_question_gets_one_with_another_answer(prompts: Prompts) -> None:
    pair = cached_pair("llama")
    answers = [item.input_ids[item.answer_start :] for item in prompts.items]
    seeds = {seed: other_question(pair.base, prompts, seed=seed).tokens for seed in range(4)}
    for tokens in seeds.values():
        assert sorted(tokens) == list(range(len(prompts)))
        for index, item in enumerate(prompts.items):
            given_answer = tokens[index][item.answer_start :]
            length = len(answers[index])
            could = [(other * length)[:length] for other in answers if other != answers[index]]
            assert given_answer in could and len(tokens[index]) == len(item.input_ids)
    assert len({repr(tokens) for tokens in seeds.values()}) > 1
    again = other_question(pair.base, prompts, seed=2).tokens
    assert again == seeds[2]


def test_questions_that_all_have_one_answer_are_refused(tmp_path: Path) -> None:
    same = [record | {"answer": "Oslo"} for record in RECORDS]
    for records in (same, RECORDS[:1]):
        prompts = build_prompts(tmp_path, records)
        with pytest.raises(InputError, match="`donor`.*other-question") as refused:
            patch(cached_pair("llama"), prompts, window=1, control=None, donor="other-question", progress=False)
        assert "\n" not in str(refused.value)


def test_an_answer_that_is_cut_down_to_the_own_one_is_no_other(tmp_path: Path) -> None:
    """Oslo never gets `Oslo in Porto`, which would be read as its own answer."""
    records = [
        {"prompt": "Where was Ada born?", "answer": "Oslo", "id": "short"},
        {"prompt": "Where was Ben born?", "answer": "Oslo in Porto", "id": "long"},
        {"prompt": "Where was Cleo born?", "answer": "Lima", "id": "else"},
    ]
    prompts = build_prompts(tmp_path, records)
    short, _, last = prompts.items
    for seed in range(6):
        tokens = other_question(cached_pair("llama").base, prompts, seed=seed).tokens
        for index, item in enumerate(prompts.items):
            assert tokens[index][item.answer_start :] != item.input_ids[item.answer_start :]
        n_answer = short.n_answer_tokens
        assert tokens[0][short.answer_start :] == (last.input_ids[last.answer_start :] * n_answer)[:n_answer]
    with pytest.raises(InputError, match="donor.*than short"):
        for seed in range(6):
            other_question(cached_pair("llama").base, build_prompts(tmp_path, records[:2]), seed=seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_donor_reads_its_tokens_where_the_target_reads_its_own(side: Any, prompts: Prompts) -> None:
    donor = other_question(cached_pair("llama").base, prompts, seed=1)
    for batch in prompts.batches(3, padding_side=side):
        for cut in (batch, batch.trimmed(), *batch.pieces(2)):
            read = donor.batch(cut)
            assert torch.equal(read.attention_mask, cut.attention_mask)
            assert torch.equal(read.columns, cut.columns) and torch.equal(read.rows, cut.rows)
            for row, example in enumerate(cut.examples):
                is_token = cut.attention_mask[row].bool()
                here = read.input_ids[row, is_token].tolist()
                assert tuple(here) == donor.tokens[example][: len(here)]
                assert torch.equal(read.input_ids[row, ~is_token], cut.input_ids[row, ~is_token])
    assert own_activations(donor.model).batch(batch) is batch


# Noise.


def noise_of(donor: Donor, states: Tensor, batch: Batch, site: str = "mlp_coef", layer: int = 1) -> Tensor:
    return donor.replacement(states, batch, site=site, layer=layer)


def test_noise_has_the_norm_of_the_state_at_every_token_and_leaves_padding(prompts: Prompts) -> None:
    donor = norm_matched_noise(cached_pair("llama").base, prompts, seed=3)
    (batch,) = prompts.batches(len(prompts), padding_side="left")
    states = torch.randn(*batch.input_ids.shape, 24, generator=torch.Generator().manual_seed(0)) * 5
    noise = noise_of(donor, states, batch)
    is_token = batch.attention_mask.bool()
    assert_close(noise.norm(dim=-1), states.norm(dim=-1), atol=1e-4)
    assert torch.equal(noise[~is_token], states[~is_token]) and (~is_token).any()
    cosines = torch.cosine_similarity(noise[is_token], states[is_token], dim=-1)
    assert cosines.abs().mean() < 0.3 and cosines.abs().max() < 0.9
    # Each position, example, site, layer and seed has directions of its own.
    drawn = torch.nn.functional.normalize(noise[is_token], dim=-1)
    alike = drawn @ drawn.T - torch.eye(len(drawn))
    assert alike.abs().max() < 0.95
    others = [
        noise_of(norm_matched_noise(donor.model, prompts, seed=4), states, batch),
        noise_of(donor, states, batch, layer=2),
        noise_of(donor, states, batch, site="mlp_out"),
    ]
    for other in others:
        assert torch.cosine_similarity(noise[is_token], other[is_token], dim=-1).abs().mean() < 0.3
    assert torch.equal(noise_of(norm_matched_noise(donor.model, prompts, seed=3), states, batch), noise)


@settings(max_examples=30, derandomize=True)
@given(
    order=st.permutations(range(len(RECORDS))),
    batch_size=st.integers(1, len(RECORDS)),
    side=st.sampled_from(["left", "right"]),
    cut=st.sampled_from(["whole", "pieces", "trimmed"]),
    narrow=st.booleans(),
)
def test_noise_is_the_same_however_batches_are_cut_and_padded(
    order: list[int], batch_size: int, side: Any, cut: str, narrow: bool, prompts: Prompts
) -> None:
    """A state of ones everywhere: what comes back is then the direction of each example's token."""
    donor = norm_matched_noise(cached_pair("llama").base, prompts, seed=0)
    expected: dict[int, Tensor] = {}
    for batch in prompts.batches(1):
        ones = torch.ones(*batch.input_ids.shape, 24)
        expected[batch.examples[0]] = noise_of(donor, ones, batch)[0, batch.attention_mask[0].bool()]
    for batch in reordered(prompts, order).batches(batch_size, padding_side=side):
        batch = replace(batch, examples=tuple(order[example] for example in batch.examples))
        for one in {"whole": [batch], "pieces": batch.pieces(2), "trimmed": [batch.trimmed()]}[cut]:
            shape = one.input_ids.shape
            if narrow:  # states kept at the scored positions only
                flat = one.rows * shape[1] + one.columns
                kept = donor.replacement(torch.ones(1, len(flat), 24), one, site="mlp_coef", layer=1, positions=flat)
                noise = torch.full((*shape, 24), torch.nan)
                noise.view(-1, 24)[flat] = kept[0]
            else:
                noise = noise_of(donor, torch.ones(*shape, 24), one)
            for row, example in enumerate(one.examples):
                here = noise[row, one.attention_mask[row].bool()]
                known = ~here.isnan().any(-1)
                assert known.any() and (narrow or known.all())
                assert_close(here[known], expected[example][: len(here)][known], atol=1e-6)


def reordered(prompts: Prompts, order: list[int]) -> Prompts:
    return replace(prompts, items=tuple(prompts.items[index] for index in order))


# In the engines.

SITE_SETS = [("mlp_coef",), ("attn_out",), ("mlp_out",), ("resid_post",), ("mlp_coef", "attn_out")]
ITEMS = [Intervention(sites, window) for sites in SITE_SETS for window in (Window(0, (0,)), Window(1, (1, 2)))]


def donors_of(family: str, dtype: torch.dtype, prompts: Prompts) -> dict[str, Donor]:
    base = cached_pair(family, dtype).base
    return {
        "other-question": other_question(base, prompts, seed=0),
        "noise": norm_matched_noise(base, prompts, seed=0),
        "third": own_activations(third(family, dtype)),
    }


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
@pytest.mark.parametrize("name", ["other-question", "noise", "third"])
def test_both_engines_patch_what_the_donor_gives(name: str, family: str, prompts: Prompts) -> None:
    """In float64, and equal to plain hooks on the Hugging Face model but for noise, which has its own test."""
    pair = cached_pair(family, torch.float64)
    donor = donors_of(family, torch.float64, prompts)[name]
    models = [pair.base, *([donor.model] if name == "third" else []), pair.unlearned]
    # Eager attention in Llama, which the reference engine runs, makes NaN of float64's lowest number at left padding,
    # and rounds its softmax to float32.
    side, tolerance = ("right", 1e-4) if family == "llama" else ("left", 1e-9)
    batches = prompts.batches(3, padding_side=side)  # type: ignore[arg-type]
    found = {engine: run_engine(engine, models, batches, ITEMS, donor=donor, chunk_tokens=100) for engine in ENGINES}
    for number, batch in enumerate(batches):
        (ours,), (theirs,) = (found[engine][number] for engine in ENGINES)
        scored = batch.rows, batch.columns
        reading = donor.batch(batch)
        oracle = PlainPatcher(
            donor.model.hf, pair.unlearned.hf, plain_inputs(pair.base, batch), plain_inputs(pair.base, reading)
        )
        assert_close(ours.base, plain_logits(pair.base, batch)[scored], atol=1e-9)
        for item, mine, reference in zip(ITEMS, ours.intervened, theirs.intervened, strict=True):
            assert_close(mine, reference, atol=tolerance)
            assert (mine - ours.target).abs().max() > 1e-3
            if name != "noise":
                assert_close(mine, oracle.logits(item.sites, item.window.layers)[scored], atol=1e-9)


def plain_logits(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.hf(**plain_inputs(model, batch)).logits
    return logits


def test_noise_in_the_reference_engine_is_that_of_the_base_s_activations(prompts: Prompts) -> None:
    """Recorded by hooks, turned into noise by hand from the same draws, and patched by hooks of TransformerLens."""
    pair = cached_pair("gpt2", torch.float64)
    (batch,) = prompts.batches(len(prompts), padding_side="left")
    donor = norm_matched_noise(pair.base, prompts, seed=5)
    item = Intervention(("mlp_coef",), Window(1, (1,)))
    (point,) = hook_points(item)
    _, activations = record(pair.base, batch, [point])
    noise = donor.replacement(activations[point], batch, site="mlp_coef", layer=1)
    is_token = batch.attention_mask.bool()
    assert_close(noise[is_token].norm(dim=-1), activations[point][is_token].norm(dim=-1), atol=1e-5)

    handle = pair.unlearned.hf.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _module, _args: (noise,))
    try:
        expected = plain_logits(pair.unlearned, batch)[batch.rows, batch.columns]
    finally:
        handle.remove()
    for engine in ENGINES:
        ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], [item], donor=donor)
        assert_close(swept.intervened[0], expected, atol=1e-9)


def test_every_donor_has_its_arm_and_its_scores_from_both_engines(prompts: Prompts) -> None:
    pair = cached_pair("llama")
    wavefront, reference = (
        patch(
            pair,
            prompts,
            sites="mlp_coef,attn_out",
            window=1,
            control=None,
            donor=["base", "other-question", "noise", third("llama")],
            engine=engine,
            batch_size=2,
            progress=False,
        )
        for engine in ENGINES
    )
    assert wavefront.arms == ["main", "other-question", "noise", "donor"]
    names = wavefront.frame.drop_duplicates("arm").set_index("arm")
    donors = {"main": "base", "other-question": "other-question", "noise": "noise", "donor": "third"}
    assert names["donor"].to_dict() == donors
    assert set(names["target"]) == {"unlearned"}
    krs, expected = (
        result.frame.pivot(index=["site", "centre", "example"], columns="arm", values="krs")
        for result in (wavefront, reference)
    )
    assert (krs.drop(columns="main").sub(krs["main"], axis=0).abs() > 1e-4).all().all()
    assert_close(krs.to_numpy(), expected.to_numpy(), atol=1e-4)
    contrast = wavefront.contrast().set_index(["arm", "site", "centre"])["difference"]
    for (arm, site, centre), difference in contrast.items():
        here = krs.loc[site, centre]
        assert_close(difference, (here["main"] - here[arm]).mean(), atol=1e-9)
    assert len(contrast) == 3 * 2 * 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", [patch, restore])
def test_a_target_that_gives_to_itself_recovers_nothing(engine: str, run: Any, prompts: Prompts) -> None:
    pair = cached_pair("gpt2", torch.float64)
    sites = "mlp_coef,resid_post" if run is patch else "value_vectors,attn_weights+mlp_coef"
    result = run(
        pair,
        prompts,
        sites=sites,
        window=[1, "suffix"],
        control=None,
        donor=pair.unlearned,
        engine=engine,
        progress=False,
    )
    krs = result.frame[result.frame["arm"] == "donor"]["krs"].to_numpy()
    assert_close(krs, np.zeros_like(krs), atol=1e-9)
    assert (result.frame[result.frame["arm"] == "main"]["krs"].abs() > 1e-6).all()


def test_a_donor_of_another_shape_or_more_than_one_or_of_weights_is_refused(prompts: Prompts) -> None:
    pair = cached_pair("llama")
    options: dict[str, Any] = {"window": 1, "control": None, "progress": False}
    for shape in ({"n_layers": 2}, {"vocab_size": 400}):
        other = Model.wrap(build_model("llama", **shape), pair.tokenizer, name="other")
        with pytest.raises(InputError, match="base and other differ in") as refused:
            patch(pair, prompts, donor=other, **options)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="`donor`.*got 2"):
        patch(pair, prompts, donor=[third("llama"), pair.unlearned], **options)
    for kind in ("noise", "other-question"):
        with pytest.raises(InputError, match=f"donor.*value_vectors.*{kind}"):
            restore(pair, prompts, donor=kind, **options)
    with pytest.raises(InputError, match="no-such-model"):
        patch(pair, prompts, donor="./no-such-model", **options)
