"""Concept vectors: measures by hand, each model read by its own head and final norm."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.hashing import content_hash
from unlearning.evaluation.metrics.concept_vectors import (
    VectorChange,
    article_tokens,
    jaccard,
    readout,
    vector_change,
)
from unlearning.evaluation.metrics.value_vectors import down_projections, value_vector


def change_of(base: PreTrainedModel, unlearned: PreTrainedModel, layer: int, dim: int) -> VectorChange:
    ours, theirs = (value_vector(down_projections(model)[layer], dim) for model in (base, unlearned))
    return vector_change(ours, theirs, (readout(base), readout(unlearned)))


def test_the_unlearned_vector_is_read_by_the_unlearned_head() -> None:
    # Only the head differs: turned around, it promotes what the base's head promotes least.
    model = build_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= -1
    change = change_of(build_tiny_llama(), model, 0, 3)
    assert change.cosine == pytest.approx(1) and change.l2 == 0
    assert change.jaccard_unembed == change.jaccard_norm_unembed == 0
    assert change.preciser is None and change.related is None  # no article


def test_each_jaccard_reads_the_vector_as_it_says() -> None:
    base, unlearned = build_tiny_llama(), build_tiny_llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (base, unlearned):
            model.model.norm.weight.copy_(torch.rand(32, generator=generator))
    change = change_of(base, unlearned, 1, 4)
    assert change.jaccard_unembed == 1  # only the norms differ
    vector = base.model.layers[1].mlp.down_proj.weight.detach()[:, 4]
    tops = [
        set((model.lm_head.weight.detach() @ (vector * model.model.norm.weight.detach())).topk(192).indices.tolist())
        for model in (base, unlearned)
    ]
    assert change.jaccard_norm_unembed == len(tops[0] & tops[1]) / len(tops[0] | tops[1]) < 1
    assert set(change.promoted_norm) == tops[0] and set(change.promoted_norm_after) == tops[1]
    assert change.promoted == change.promoted_after


def test_bias_of_the_final_norm_is_no_part_of_a_vector() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    vector = value_vector(down_projections(model)[0], 3)
    clean = readout(model).scores(vector, norm=True)
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
    assert torch.allclose(readout(model).scores(vector, norm=True), clean)


def test_readout_leaves_the_model_as_it_was() -> None:
    model = build_tiny_llama()
    before = content_hash(model, name="before")
    assert next(readout(model).final_norm.parameters()).dtype == torch.float64
    assert content_hash(model, name="before") == before
    assert not any(module._forward_hooks for module in model.modules())


def test_cosine_is_clipped_and_a_vector_that_is_zero_has_none() -> None:
    base = build_tiny_llama()
    same = change_of(base, base, 1, 2)
    assert same.cosine is not None and 1 - 1e-12 <= same.cosine <= 1
    assert same.jaccard_unembed == same.jaccard_norm_unembed == 1
    model = build_tiny_llama()
    value_vector(down_projections(model)[1], 2).zero_()
    gone = change_of(base, model, 1, 2)
    assert gone.cosine is None and gone.l2 == pytest.approx(same.base_norm)


def test_jaccard_by_hand() -> None:
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})) == pytest.approx(2 / 5)
    assert jaccard(frozenset(), frozenset()) == 1


def test_article_tokens_are_without_stop_words_and_punctuation(tokenizer: PreTrainedTokenizerFast) -> None:
    found = article_tokens(tokenizer, "Oslo and the, Oslo! THEN Lima.")
    whole = {*tokenizer("Oslo")["input_ids"], *tokenizer(" Oslo")["input_ids"], *tokenizer(" Lima")["input_ids"]}
    assert found == {token for token in whole if tokenizer.decode([token]).strip()}
    assert article_tokens(tokenizer, "") == article_tokens(tokenizer, "the and, of!") == frozenset()
