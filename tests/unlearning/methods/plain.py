"""A short training, slowly: text by text without padding, in float64."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import Example
from unlearning.data.encoding import encode

FORGET, RETAIN = build_examples()[:4], build_examples()[4:8]
RUN: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "learning_rate": 2e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "logging_steps": 1,
    "max_steps": 4,
    "progress": False,
    "device": "cpu",
}
RHO, BETA, ALPHA = 0.3, 0.5, 2.0


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Any]:
    """Log-probabilities of the vocabulary at each answer's tokens, and the tokens, text by text without padding."""
    found = []
    for span in encode(tokenizer, examples, append_eos=True, max_length=None).spans:
        logits = model(torch.tensor([span.input_ids])).logits[0, span.answer_start - 1 : -1]
        found.append((logits.log_softmax(-1), torch.tensor(span.input_ids[span.answer_start :])))
    return found


def nll(found: list[Any]) -> list[Tensor]:
    return [-log_p[torch.arange(len(tokens)), tokens].sum() for log_p, tokens in found]


def pooled(found: list[Any]) -> Tensor:
    return torch.stack(nll(found)).sum() / sum(len(tokens) for _, tokens in found)


def npo(found: list[Any], reference: list[Tensor]) -> Tensor:
    pairs = zip(nll(found), reference, strict=True)
    return torch.stack([-(2 / BETA) * F.logsigmoid(BETA * (ours - theirs)) for ours, theirs in pairs]).mean()


def negative_entropy(found: list[Any]) -> Tensor:
    every = torch.cat([(log_p.exp() * log_p).sum(-1) for log_p, _ in found])
    return every.mean()


def slopes(loss: Tensor, model: PreTrainedModel) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def divergence(ours: list[Any], theirs: list[Any]) -> Tensor:
    """Mean KL(theirs || ours) over the tokens."""
    pairs = zip(torch.cat([q for q, _ in theirs]), torch.cat([p for p, _ in ours]), strict=True)
    return torch.stack([(q.exp() * (q - p)).sum() for q, p in pairs]).mean()


def plain_loop(
    tokenizer: PreTrainedTokenizerFast,
    forget_slopes: Any,
    *,
    retain_loss: Any = pooled,
    alpha: float = ALPHA,
    start: PreTrainedModel | None = None,
) -> list[Tensor]:
    """Four steps; `forget_slopes` gives the forget gradient of a step, and may move a copy of the model."""
    model = build_tiny_llama().double() if start is None else start.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RUN["learning_rate"], weight_decay=0)
    with torch.no_grad():
        reference = nll(answers(model, tokenizer, FORGET))
    for step in range(RUN["max_steps"]):
        f = forget_slopes(copy.deepcopy(model), step, reference)
        r = slopes(retain_loss(answers(model, tokenizer, RETAIN)), model)
        for parameter, one, other in zip(model.parameters(), f, r, strict=True):
            parameter.grad = one + alpha * other
        optimizer.step()
    return list(model.parameters())


def assert_close(model: PreTrainedModel, expected: list[Tensor], unmoved: list[Tensor]) -> None:
    """The weights of the loop, and not those of a loop that takes the gradient at the present weights."""
    # Adam moves a weight of almost no gradient by its sign, which rounding may turn: most weights, not all.
    ours, theirs, plain = (
        torch.cat([p.detach().double().flatten() for p in parts]) for parts in (model.parameters(), expected, unmoved)
    )
    off, apart = (ours - theirs).abs(), (theirs - plain).abs()
    assert off.quantile(0.99) < 1e-5
    assert apart.quantile(0.9) > 1e-4


SIZES = [{"batch_size": 4, "gradient_accumulation_steps": 1}, {"batch_size": 1, "gradient_accumulation_steps": 4}]
