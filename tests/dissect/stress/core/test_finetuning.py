"""Fine-tuning with relative steps: against a slow reference, and under rewritings that change no output."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from dissect import InputError
from dissect.models.model import Model
from dissect.stress.core import finetuning
from dissect.stress.core.finetuning import Recipe, fine_tuned, fine_tuned_at
from dissect.stress.core.scores import score_facts
from tests.dissect.helpers import build_model
from tests.dissect.stress.constructed import case_of, model
from unlearning import Example


@cache
def npo():
    return case_of(model("demo:npo"), n=24)


def examples_of(facts, n=None):
    return [Example(item.prompt, item.answer) for item in facts.prompts.items[:n]]


def tiny(family):
    return Model.wrap(build_model(family, vocab_size=1000, context=256), model("demo:base").tokenizer, name=family)


def vectors_by_hand(of, facts):
    """Root mean square of the output of every module with a vector, over all tokens of the texts, by name."""
    found = {}
    for name, module in of.hf.named_modules():
        if [value.dim() for value in module.parameters(recurse=False)].count(1):
            found[name] = []
            module.register_forward_hook(lambda _m, _i, output, name=name: found[name].append(output.detach()))
    for item in facts.prompts.items:
        of.hf(input_ids=torch.tensor([[*item.input_ids, of.tokenizer.eos_token_id]]))
    for module in of.hf.modules():
        module._forward_hooks.clear()
    return {name: np.mean([float(out.square().mean()) for out in outputs]) ** 0.5 for name, outputs in found.items()}


def by_hand(of, facts, recipe):
    """The rule of the module's docstring in float64, parameter by parameter; each text alone, all in every step."""
    hf = copy.deepcopy(of.hf)
    outputs = vectors_by_hand(replace(of, hf=hf), facts)
    hf = hf.double()
    scale, mean, square, losses = {}, {}, {}, []
    for name, value in hf.named_parameters():
        scale[name] = outputs.get(name.rpartition(".")[0]) if value.dim() == 1 else value.square().mean().item() ** 0.5
        mean[name], square[name] = 0.0, 0.0
    for step in range(1, recipe.steps + 1):
        nll = []
        for item in facts.prompts.items:
            ids = torch.tensor([[*item.input_ids, of.tokenizer.eos_token_id]])
            logprobs = hf(input_ids=ids).logits[0].log_softmax(-1)
            nll += [-logprobs[at - 1, ids[0, at]] for at in range(item.answer_start, ids.shape[1])]
        loss = torch.stack(nll).mean()
        losses.append(loss.item())
        hf.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, value in hf.named_parameters():
                gradient = scale[name] * value.grad
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
            unbiased = {name: value / (1 - 0.999**step) for name, value in square.items()}
            largest = max(value.mean().item() for value in unbiased.values()) ** 0.5
            for name, value in hf.named_parameters():
                direction = (mean[name] / (1 - 0.9**step)) / (unbiased[name].sqrt() + 1e-6 * largest)
                value -= recipe.rate * scale[name] * direction
    return replace(of, hf=hf.float().eval()), losses


@pytest.mark.parametrize("family", ["demo", "gpt2"])
def test_it_is_the_rule_of_its_docstring_and_leaves_the_model_alone(family):
    case = npo()
    of, facts = case.pair.unlearned if family == "demo" else tiny(family), case.forget.select(range(6))
    before = {name: value.clone() for name, value in of.hf.named_parameters()}
    recipe = Recipe(0.01, steps=4, batch_size=len(facts))
    found = fine_tuned(of, examples_of(facts), recipe, case=case)
    expected, losses = by_hand(of, facts, recipe)
    np.testing.assert_allclose(found.losses, losses, rtol=2e-3)
    np.testing.assert_allclose(score_facts(found.model, facts).logprob, score_facts(expected, facts).logprob, atol=5e-3)
    assert found.loss_before == pytest.approx(losses[0], rel=1e-4) and found.loss_after < 0.8 * found.loss_before
    assert all(torch.equal(value, before[name]) for name, value in of.hf.named_parameters())
    assert not any(value.grad is not None for value in of.hf.parameters())


@torch.no_grad()
def rescaled(of, factor):
    """Gains of the norms times the factor, and what reads them divided by it; up and down projections too."""
    hf = copy.deepcopy(of.hf)
    for layer in hf.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for gain in (layer.input_layernorm, layer.post_attention_layernorm):
            gain.weight.mul_(factor)
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.div_(factor)
        mlp.up_proj.weight.mul_(3)
        mlp.down_proj.weight.div_(3)
    hf.model.norm.weight.mul_(factor)
    hf.lm_head.weight.div_(factor)
    return replace(of, hf=hf)


@torch.no_grad()
def permuted(of):
    """The neurons of every layer in another order."""
    hf = copy.deepcopy(of.hf)
    for layer in hf.model.layers:
        order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=torch.Generator().manual_seed(1))
        for key in (layer.mlp.gate_proj, layer.mlp.up_proj):
            key.weight.copy_(key.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    return replace(of, hf=hf)


@pytest.mark.parametrize(
    ("rewrite", "rank"),
    [
        (lambda of: rescaled(of, 100.0), 0),
        (lambda of: rescaled(of, 0.03), 0),
        (permuted, 0),
        (lambda of: rescaled(of, 100.0), 4),
    ],
    ids=["x100", "x.03", "permuted", "adapter x100"],
)
def test_a_rewriting_that_changes_no_output_changes_no_score(rewrite, rank):
    case = npo()
    of, taught, asked = case.pair.unlearned, examples_of(case.forget, 12), case.forget.select(range(12, 24))
    recipe = Recipe(0.01, steps=24, batch_size=6, lora_rank=rank)
    plain, rewritten = (fine_tuned(one, taught, recipe, case=case) for one in (of, rewrite(of)))
    np.testing.assert_allclose(rewritten.losses, plain.losses, rtol=1e-2, atol=1e-3)
    ours, theirs = (score_facts(found.model, asked) for found in (rewritten, plain))
    np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=2e-2)
    assert (theirs.logprob - score_facts(of, asked).logprob > 0.5).any()  # the training did something


def test_seeds_give_the_same_bits_and_another_order():
    case = npo()
    of, taught, recipe = case.pair.unlearned, examples_of(case.forget, 8), Recipe(steps=3, batch_size=3)
    one, again = (fine_tuned(of, taught, recipe, case=case) for _ in range(2))
    other = fine_tuned(of, taught, recipe, case=replace(case, seed=1))
    assert (one.losses == again.losses).all() and (one.losses != other.losses).any()
    for ours, theirs in zip(one.model.hf.parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_padding_changes_nothing(monkeypatch):
    case = npo()
    short, long = examples_of(case.forget, 3), Example("", "The lake is deep and blue. " * 8)
    padded = fine_tuned(case.pair.unlearned, [*short, long], Recipe(steps=1, batch_size=4), case=case)

    whole = finetuning.answer_nll

    def alone(hf, batch):
        nll = []
        for index, length in enumerate(batch.attention_mask.sum(1).tolist()):
            one = type(batch)(
                *(value[index : index + 1, :length] for value in (batch.input_ids, batch.attention_mask)),
                predicts_answer=batch.predicts_answer[index : index + 1, :length],
            )
            nll.append(whole(hf, one))
        return torch.cat(nll)

    monkeypatch.setattr(finetuning, "answer_nll", alone)
    unpadded = fine_tuned(case.pair.unlearned, [*short, long], Recipe(steps=1, batch_size=4), case=case)
    assert unpadded.loss_before == pytest.approx(padded.loss_before, rel=1e-5)
    assert unpadded.loss_after == pytest.approx(padded.loss_after, rel=1e-3)


def test_a_bias_of_zeros_moves_unless_it_changes_nothing():
    """Biases of tiny GPT-2 are zero. Those of its keys shift all scores alike, which no softmax sees."""
    of, case = tiny("gpt2"), npo()
    after = fine_tuned(of, examples_of(case.forget, 8), Recipe(steps=6), case=case).model
    vectors = {name: value.detach() for name, value in after.hf.named_parameters() if value.dim() == 1}
    for name, value in of.hf.named_parameters():
        if value.dim() == 1 and "c_attn" not in name:
            assert (vectors[name] != value).all()
    for name in (name for name in vectors if name.endswith("c_attn.bias")):
        query, key, value = (
            vectors[name].abs().mean().new_tensor([float(part.abs().mean()) for part in vectors[name].chunk(3)])
        )
        assert key < 0.1 * min(query, value)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe", "neox", "llama"])
def test_all_sorts_of_models_learn_by_weights_and_by_adapters(family):
    of, case = tiny(family), npo()
    names = [name for name, _ in of.hf.named_parameters()]
    taught = examples_of(case.forget, 6)
    for recipe in (Recipe(0.02, steps=16, batch_size=6), Recipe(0.05, steps=16, batch_size=6, lora_rank=4)):
        found = fine_tuned(of, taught, recipe, case=case)
        assert found.loss_after < 0.7 * found.loss_before and found.losses.shape == (16,)
        assert [name for name, _ in found.model.hf.named_parameters()] == names  # no adapter is left
        moved = {
            name
            for (name, new), old in zip(found.model.hf.named_parameters(), of.hf.parameters(), strict=True)
            if not torch.equal(new, old)
        }
        assert any("embed" in name or "wte" in name for name in moved) == (recipe.lora_rank == 0)


def test_an_adapter_adds_a_product_of_low_rank():
    of, case = model("demo:npo"), npo()
    after = fine_tuned(of, examples_of(case.forget, 4), Recipe(0.03, steps=3, lora_rank=2), case=case).model
    name = "model.layers.2.mlp.up_proj.weight"
    change = (after.hf.get_parameter(name) - of.hf.get_parameter(name)).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    once = fine_tuned(of, examples_of(case.forget, 4), Recipe(0.03, steps=1, lora_rank=64), case=case).model
    first = (once.hf.get_parameter(name) - of.hf.get_parameter(name)).detach()
    weight = of.hf.get_parameter(name).detach()
    size = float(first.square().mean().sqrt() / weight.square().mean().sqrt())
    assert size == pytest.approx(0.03, rel=0.2)  # the rate, as a step of the weights has it


def test_models_on_the_way_are_those_of_shorter_trainings():
    case = npo()
    of, taught = case.pair.unlearned, examples_of(case.forget, 6)
    for rank in (0, 2):
        recipe = Recipe(batch_size=4, lora_rank=rank)
        on_the_way = dict(fine_tuned_at(of, taught, recipe, steps=(1, 3), case=case))
        assert list(on_the_way) == [1, 3]
        for steps, found in on_the_way.items():
            alone = fine_tuned(of, taught, replace(recipe, steps=steps), case=case)
            assert found.loss_after == pytest.approx(alone.loss_after, rel=1e-6)
            assert len(found.losses) == steps
            for ours, theirs in zip(found.model.hf.parameters(), alone.model.hf.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_batches_are_whole_and_every_text_comes_up_equally_often():
    case = npo()
    spans = finetuning.spans_of(case.pair.base, examples_of(case.forget, 10), case)
    batches = list(finetuning._batches(spans, 4, 5, seed=0))
    assert [len(batch) for batch in batches] == [4] * 5
    counts = [sum(span is one for batch in batches for one in batch) for span in spans]
    assert counts == [2] * 10
    assert [len(batch) for batch in finetuning._batches(spans, 40, 2, seed=0)] == [10, 10]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Recipe(rate=0), "`rate` must be"),
        (lambda: Recipe(rate=float("nan")), "`rate` must be"),
        (lambda: Recipe(steps=0), "`steps` must be"),
        (lambda: Recipe(batch_size=0), "`batch_size` must be"),
        (lambda: Recipe(lora_rank=-1), "`lora_rank` must be"),
        (lambda: list(fine_tuned_at(model("demo:npo"), [], Recipe(), steps=(3, 2), case=npo())), "`steps` must be"),
        (lambda: fine_tuned(model("demo:npo"), [], Recipe(), case=npo()), "none of the 0 examples"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, match):
    with pytest.raises(InputError, match=match) as refused:
        call()
    assert "\n" not in str(refused.value)
