"""A model and its start, random spans, the batches of a step; and the same slowly: token by token, unpadded."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.unlearning.helpers import build_tiny_llama
from unlearning.data.batches import TokenBatch, collate
from unlearning.data.spans import AnswerSpan
from unlearning.methods.method import AnyMethod, Batch, Reference, StepBatch

START = build_tiny_llama(1).double()


def build_model() -> LlamaForCausalLM:
    """A model that has gone some way from START."""
    model, other = copy.deepcopy(START), build_tiny_llama(2).double()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.lerp_(theirs, 0.1)
    return model


MODEL = build_model()


def build_spans(lengths: Sequence[tuple[int, int]], seed: int) -> list[AnswerSpan]:
    """Random tokens, given as (prompt tokens, answer tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        AnswerSpan(torch.randint(384, (prompt + answer,), generator=generator).tolist(), prompt)
        for prompt, answer in lengths
    ]


@dataclass(frozen=True)
class Data:
    """One step batch; the alternates are of the same prompts as the forget examples."""

    forget: list[AnswerSpan]
    alternate: list[AnswerSpan]
    retain: list[AnswerSpan]


DATA = Data(
    forget=build_spans([(3, 1), (5, 4), (2, 7)], seed=1),
    alternate=build_spans([(3, 2), (5, 1), (2, 3)], seed=2),
    retain=build_spans([(4, 5), (1, 2), (6, 1)], seed=3),
)


def n_answer(spans: Sequence[AnswerSpan]) -> int:
    return sum(span.n_answer_tokens for span in spans)


def step_batch_of(data: Data) -> StepBatch:
    return StepBatch(
        forget_sequences=len(data.forget),
        forget_tokens=n_answer(data.forget),
        forget_positions=sum(len(span.input_ids) for span in data.forget),
        alternate_sequences=len(data.alternate),
        alternate_tokens=n_answer(data.alternate),
        retain_sequences=len(data.retain),
        retain_tokens=n_answer(data.retain),
        retain_positions=sum(len(span.input_ids) for span in data.retain),
    )


def slow_logits(model: LlamaForCausalLM, span: AnswerSpan) -> Tensor:
    """What predicts each answer token, from one unpadded text."""
    return model(torch.tensor([span.input_ids])).logits[0, span.answer_start - 1 : -1]


def slow_nll(model: LlamaForCausalLM, span: AnswerSpan) -> list[Tensor]:
    rows, tokens = slow_logits(model, span), span.input_ids[span.answer_start :]
    return [-torch.log(row.softmax(-1)[token]) for row, token in zip(rows, tokens, strict=True)]


def slow_hidden(model: LlamaForCausalLM, span: AnswerSpan, layer: int) -> Tensor:
    """What the block above reads, or the final norm."""
    above = [*model.model.layers, model.model.norm][layer + 1]
    seen: list[Tensor] = []
    handle = above.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([span.input_ids]))
    handle.remove()
    return seen[0][0]


def slow_reference_hidden(span: AnswerSpan, layer: int | tuple[int, ...]) -> Tensor:
    layers = (layer,) if isinstance(layer, int) else layer
    return torch.cat([slow_hidden(START, span, index) for index in layers], dim=-1)


@torch.no_grad()
def batch_of(spans: Sequence[AnswerSpan], references: Sequence[Reference], data: str, padding: int = 0) -> TokenBatch:
    """The spans as `data` (forget, alternate or retain), with constants of START and more padding than they need."""
    batch = collate(spans)
    asked = {reference.quantity: reference.layer for reference in references if reference.data == data}
    nll = [torch.stack(slow_nll(START, span)).sum() for span in spans] if "nll" in asked else None
    logits = [slow_logits(START, span) for span in spans] if "logits" in asked else None
    hidden = [slow_reference_hidden(span, asked["hidden"] or 0) for span in spans] if "hidden" in asked else None
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, padding), value=5),
        attention_mask=F.pad(batch.attention_mask, (0, padding)),
        predicts_answer=F.pad(batch.predicts_answer, (0, padding)),
        reference_nll=torch.stack(nll) if nll else None,
        reference_logits=torch.cat(logits) if logits else None,
        reference_hidden=torch.cat(hidden) if hidden else None,
    )


def losses_of(
    method: AnyMethod,
    options: Any,
    data: Data,
    *,
    model: LlamaForCausalLM = MODEL,
    cuts: Sequence[int] = (),
    order: Sequence[int] | None = None,
    padding: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """The step batch's forget and retain loss, as the sum over its micro-batches.

    Args:
        cuts: where one micro-batch ends and the next begins.
        order: of the examples.
        padding: more of it than is needed.
    """
    order = list(range(len(data.forget))) if order is None else order
    edges = [0, *cuts, len(order)]
    pieces = [order[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    needs = method.needs(options)

    def part(name: str, piece: Sequence[int]) -> TokenBatch:
        return batch_of([getattr(data, name)[place] for place in piece], needs.references, name, padding)

    def retain_batches(statistic: float | None) -> list[Batch]:
        return [Batch(step_batch_of(data), retain=part("retain", piece), statistic=statistic) for piece in pieces]

    def forget_batches(statistic: float | None) -> list[Batch]:
        return [
            Batch(
                step_batch=step_batch_of(data),
                forget=replace(part("forget", piece), index=torch.tensor(piece)),
                alternate=part("alternate", piece) if needs.alternates else None,
                statistic=statistic,
            )
            for piece in pieces
        ]

    statistics: dict[str, float] = {}
    if method.statistic is not None:
        read = forget_batches if method.statistic_of == "forget" else retain_batches
        sums = [method.statistic(model, batch, options) for batch in read(None)]
        statistics[method.statistic_of] = sum(total for total, _ in sums) / sum(count for _, count in sums)
    forget = retain = None
    if method.forget_loss is not None:
        batches = forget_batches(statistics.get("forget"))
        forget = torch.stack([method.forget_loss(model, batch, options) for batch in batches]).sum()
    if method.retain_loss is not None and needs.retain:
        batches = retain_batches(statistics.get("retain"))
        retain = torch.stack([method.retain_loss(model, batch, options) for batch in batches]).sum()
    return forget, retain
