"""The gradient norm against a backward pass by hand, and what it leaves as it was."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.gradient_norm import gradient_norms
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, encode_target


def targets_of(subject: Subject, n: int = 3) -> list[Target]:
    return [encode_target(subject, example.prompt, example.answer) for example in build_examples(n)]


def slow_norm(model: LlamaForCausalLM, target: Target) -> float:
    """Transformers' own loss over labels, and a backward pass."""
    ids = torch.tensor([target.span.input_ids])
    labels = ids.clone()
    labels[0, : target.span.answer_start] = -100
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    norms = [float((p.grad.double() ** 2).sum().sqrt()) for p in model.parameters() if p.grad is not None]
    return sum(norms) / len(norms)


@pytest.mark.parametrize("ties", [False, True])
def test_norms_are_those_of_a_backward_pass(tokenizer: PreTrainedTokenizerFast, ties: bool) -> None:
    model = build_tiny_llama()
    if ties:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    subject = Subject.wrap(model, tokenizer)
    targets = targets_of(subject)
    expected = [slow_norm(build_like(model), target) for target in targets]
    counted: list[int] = []
    assert gradient_norms(subject, targets, advance=counted.append) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3 and counted == [1, 1, 1]


def build_like(model: LlamaForCausalLM) -> LlamaForCausalLM:
    import copy

    return copy.deepcopy(model)


def test_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    subject = Subject.wrap(model, tokenizer)
    targets = targets_of(subject)
    expected = gradient_norms(subject, targets)
    frozen, held, *_ = model.parameters()
    frozen.requires_grad_(False)
    held.grad = torch.full_like(held, 3.0)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert gradient_norms(subject, targets) == pytest.approx(expected)  # frozen tensors count too
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad and frozen.grad is None
    assert held.grad is not None and held.grad.unique().tolist() == [3.0]
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)
    with pytest.raises(InputError, match="vocabulary size 384"):
        gradient_norms(subject, [Target(type(targets[0].span)([1, 5000], 1), 0)])
    assert [module.training for module in model.modules()] == modes


def test_norm_that_is_not_finite_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    subject = Subject.wrap(model, tokenizer)
    targets = targets_of(subject, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(float("inf"))
    with pytest.raises(InputError, match="gradients.*finite"):
        gradient_norms(subject, targets)
