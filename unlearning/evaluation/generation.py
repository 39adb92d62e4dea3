"""Greedy answers, batched, the same as one by one."""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.errors import InputError


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 30,
    batch_size: int = 64,
    add_special_tokens: bool = True,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, without the prompt and without outer white space.

    Stops at an end-of-sequence token (the tokenizer's, or one of the model's generation configuration), at
    `max_new_tokens`, or at the end of the model's context. Batches are padded on the left, with positions counted from
    each prompt's first token, so an answer does not depend on its neighbours (up to ties within rounding). A tokenizer
    that closes every text with the end-of-sequence token has it removed from the prompt. A prompt made by a chat
    template holds its special tokens already: `add_special_tokens=False`.

    Raises:
        InputError: a prompt without tokens, or one that leaves no room for an answer.
    """
    encoded = [_prompt_ids(tokenizer, prompt, add_special_tokens) for prompt in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise InputError(f"prompt {number} has no tokens; write something before the answer")
        if limit is not None and len(ids) >= limit:
            raise InputError(f"prompt {number} has {len(ids)} tokens, the model's context {limit}; shorten it")
    stop = _stop_tokens(model, tokenizer)
    # Prompts of similar length together: little padding.
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    answers = [""] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            rows = _greedy_batch(model, [encoded[place] for place in places], stop, max_new_tokens)
            for place, row in zip(places, rows, strict=True):
                answers[place] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    finally:
        model.train(was_training)
    return answers


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool) -> list[int]:
    ids = list(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
    eos = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos and not prompt.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is not None:
        stop |= set(configured) if isinstance(configured, list) else {configured}
    return stop


@torch.no_grad()
def _greedy_batch(
    model: PreTrainedModel, prompts: list[list[int]], stop: set[int], max_new_tokens: int
) -> list[list[int]]:
    input_ids, mask = _left_pad(prompts, model.device)
    limit = getattr(model.config, "max_position_embeddings", None) or input_ids.shape[1] + max_new_tokens
    room = [min(max_new_tokens, limit - len(ids)) for ids in prompts]
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        placed = {"position_ids": positions} if "position_ids" in accepted else {}
        output = model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **placed, **last_only
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            if row not in open_rows:
                continue
            if token not in stop:
                rows[row].append(token)
            if token in stop or len(rows[row]) == room[row]:
                open_rows.remove(row)
        if not open_rows:
            break
        input_ids = chosen[:, None]
        positions = (positions[:, -1:] + 1).clamp(max=limit - 1)  # finished rows wait inside the context
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return rows


def _left_pad(
    prompts: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    width = max(len(ids) for ids in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return input_ids.to(device), mask.to(device)
