"""Score several answers to one question, running the tokens that they share only once.

    first pass      the tokens that a question's answers share, each question once; keys and values are kept
    second pass     each answer's own tokens after a copy of these keys and values

The last token of the first pass predicts an answer's first token if only the prompt is shared.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.scoring.recovery import answer_logprob, per_example

_COPYABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Caches that replace their tensors instead of writing into them, so that a shallow copy is independent."""

_RECORDING = "transformers.utils.output_capturing"
"""Module of the hooks that stay on a model whose hidden states were requested once."""


@dataclass(frozen=True)
class Pointwise:
    """A forward hook that treats every position by itself, so that it may be given parts of texts.

    Attributes:
        hook: A hook as `register_forward_hook` takes it.
    """

    hook: Callable[[nn.Module, Any, Any], Any]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return what the hook returns."""
        return self.hook(module, args, output)


@torch.inference_mode()
def score_with_prompts_once(
    model: Model, questions: Sequence[Sequence[Prompt]], *, pad_token_id: int, batch_size: int
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]] | None:
    """Score all answers to all questions, question by question, as `score_answers` does.

    Args:
        model: A model in memory.
        questions: The answers of each question.
        pad_token_id: Token that fills the batches.
        batch_size: Maximum number of questions, and of answers, in one batch.

    Returns:
        Mean log-probability in nats of every answer's tokens, and 1 if all of them are the most probable ones, else 0.
        None if whole texts have to be run: nothing is shared; a hook that is not `Pointwise`, or a replaced forward, is
        on one of the model's modules; the model takes no explicit positions, or caches more than keys and values; or a
        logit is not finite.
    """
    shared = [_shared(answers) for answers in questions]
    if not shared or min(shared) == 0 or max(map(len, questions)) == 1:
        return None
    if not model.takes_position_ids or _is_touched(model.hf):
        return None
    ends = np.cumsum([len(answers) for answers in questions])
    found = _Found()
    order = sorted(range(len(questions)), key=shared.__getitem__)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        starts = [questions[number][0].input_ids[: shared[number]] for number in chosen]
        ids, mask = _padded(starts, pad_token_id, left=True)
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits, cache = _run(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), last=True)
        if type(cache) is not DynamicCache or any(type(layer) not in _COPYABLE for layer in cache.layers):
            return None
        answers = [
            _Answer(int(ends[number]) - len(questions[number]) + index, row, shared[number], item)
            for row, number in enumerate(chosen)
            for index, item in enumerate(questions[number])
        ]
        at_once = [answer for answer in answers if answer.item.scored.start == answer.shared - 1]
        found.note(
            logits[:, -1],
            [answer.row for answer in at_once],
            [answer.item.input_ids[answer.shared] for answer in at_once],
            [answer.index for answer in at_once],
        )
        later = sorted((answer for answer in answers if answer.rest), key=lambda answer: len(answer.rest))
        for start in range(0, len(later), batch_size):
            _second_pass(model, later[start : start + batch_size], cache, mask, pad_token_id, found)
    return found.scores(int(ends[-1]))


@dataclass(frozen=True, eq=False)
class _Answer:
    """One text of the second pass.

    Attributes:
        index: Index among all answers to all questions.
        row: Row of its question in the first pass.
        shared: Number of its tokens that the first pass has read.
        item: The whole text.
    """

    index: int
    row: int
    shared: int
    item: Prompt

    @property
    def rest(self) -> tuple[int, ...]:
        """Its tokens after the shared ones, up to the last one that predicts something."""
        return self.item.input_ids[self.shared : self.item.scored.stop]


@dataclass(eq=False)
class _Found:
    """Scores of single tokens, in any order."""

    logprobs: list[Tensor] = field(default_factory=list)
    likeliest: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    is_finite: bool = True

    def note(
        self, logits: Float[Tensor, "position vocab"], at: Sequence[int], tokens: Sequence[int], indices: Sequence[int]
    ) -> None:
        """Score tokens that are predicted at some of these positions, as parts of the answers with these indices."""
        if not at:
            return
        at_, tokens_, indices_ = (torch.tensor(numbers, device=logits.device) for numbers in (at, tokens, indices))
        self.is_finite &= bool(torch.isfinite(logits[at_.unique()]).all())
        self.logprobs.append(answer_logprob(logits.log_softmax(-1)[at_], tokens_))
        self.likeliest.append((logits.argmax(-1)[at_] == tokens_).double())
        self.indices.append(indices_)

    def scores(self, n: int) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]] | None:
        """Return mean log-probability and whether all tokens are the most probable; None if a logit is not finite."""
        if not self.is_finite:
            return None
        indices = torch.cat(self.indices)
        logprob, share = (per_example(torch.cat(of_token), indices, n) for of_token in (self.logprobs, self.likeliest))
        return logprob.cpu().numpy(), (share == 1).double().cpu().numpy()


def _second_pass(
    model: Model,
    answers: Sequence[_Answer],
    cache: Cache,
    mask: Int[Tensor, "question position"],
    pad_token_id: int,
    found: _Found,
) -> None:
    """Run the answers' own tokens after the shared ones, and note their scores."""
    rows = torch.tensor([answer.row for answer in answers], device=mask.device)
    ids, kept = _padded([answer.rest for answer in answers], pad_token_id, left=False)
    ids, kept = ids.to(mask.device), kept.to(mask.device)
    positions = mask.sum(-1)[rows, None] + torch.arange(ids.shape[1], device=mask.device)
    again = copy.copy(cache)
    again.layers = [copy.copy(layer) for layer in cache.layers]
    again.batch_select_indices(rows)
    logits, _ = _run(model, ids, torch.cat([mask[rows], kept], dim=1), positions, cache=again)
    at, tokens, indices = [], [], []
    for row, answer in enumerate(answers):
        for position in answer.item.scored:
            if position >= answer.shared:
                at.append(row * ids.shape[1] + position - answer.shared)
                tokens.append(answer.item.input_ids[position + 1])
                indices.append(answer.index)
    found.note(logits.flatten(0, 1), at, tokens, indices)


def _run(
    model: Model,
    ids: Int[Tensor, "batch position"],
    mask: Int[Tensor, "batch all_positions"],
    positions: Int[Tensor, "batch position"],
    *,
    cache: Cache | None = None,
    last: bool = False,
) -> tuple[Float[Tensor, "batch position vocab"], Cache | None]:
    """Return logits, in float32 or wider, and the cache; with `last`, logits of the last position may be all."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if cache is not None:
        inputs["past_key_values"] = cache
    if last and "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        inputs["logits_to_keep"] = 1
    output = model.hf(**inputs, use_cache=True)
    logits = output.logits
    return logits if logits.dtype == torch.float64 else logits.float(), getattr(output, "past_key_values", None)


def _shared(answers: Sequence[Prompt]) -> int:
    """Return the number of tokens that all texts begin with, up to the first one that predicts a scored token."""
    n = min(item.scored.start for item in answers) + 1
    first = answers[0].input_ids
    return next((at for at in range(n) if any(item.input_ids[at] != first[at] for item in answers)), n)


def _is_touched(hf: nn.Module) -> bool:
    """Return whether a module has a hook or a replaced forward that might look at more than single positions.

    The hooks by which transformers records states change nothing and do not count.
    """
    return any(
        "forward" in vars(module)
        or any(
            getattr(hook, "__module__", "") != _RECORDING and not isinstance(hook, Pointwise)
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        for module in hf.modules()
    )


def _padded(
    texts: Sequence[Sequence[int]], pad_token_id: int, *, left: bool
) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    """Return token ids padded to one length, and 1 for tokens and 0 for padding."""
    ids = torch.full((len(texts), max(map(len, texts))), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        where = slice(ids.shape[1] - len(text), None) if left else slice(0, len(text))
        ids[row, where] = torch.tensor(text)
        mask[row, where] = 1
    return ids, mask
