"""Greedy and sampled answers in batches, the same as one by one."""

import inspect
from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.token_ids import end_tokens
from unlearning.common.context import context_of, why_no_longer
from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.spans import encode_prompt


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 30,
    batch_size: int = 64,
    chat: ChatFormat | None = None,
    stop_texts: Sequence[str] = (),
    verbatim: bool = False,
) -> list[str]:
    """Return the greedy continuation of each prompt, without the prompt and without outer white space.

    An answer ends where `answer_ends` says, after `max_new_tokens`, or at the end of the model's context. Batches are
    padded on the left, with positions counted from each prompt's first token, so an answer does not depend on the other
    prompts (up to ties within rounding). For the prompts' tokens see `unlearning.data.spans.encode_prompt`.

    Args:
        model: The model; it keeps its mode.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Number of prompts at a time.
        chat: Chat template that the prompts were wrapped in, or None.
        stop_texts: An answer ends before the first of these texts, such as "Question:".
        verbatim: Keep the white space that prompts end with, as the code of a published benchmark does.

    Returns:
        One answer per prompt, in the order of the prompts.

    Raises:
        InputError: A prompt has no tokens, or leaves no room for an answer.
    """
    encoded = _encode(model, tokenizer, prompts, chat, verbatim=verbatim)
    ends = answer_ends(model, tokenizer, chat, stop_texts)
    answers = [""] * len(encoded)
    for places in _batches(encoded, batch_size):
        rows = _generate(
            model,
            [encoded[place] for place in places],
            _most_likely,
            ends.tokens,
            max_new_tokens,
            ended=_stops_at(tokenizer, ends.texts),
        )
        for place, row in zip(places, rows, strict=True):
            answers[place] = _text(tokenizer, row, ends.texts)
    return answers


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 200,
    stop_texts: Sequence[str] = (),
    batch_size: int = 64,
    chat: ChatFormat | None = None,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[list[str]]:
    """Return continuations drawn from the model's distribution, several per prompt; see `greedy_answers`.

    Sample j of prompt i depends on the seed, i and j, and not on its batch: one uniform number per token is turned into
    a token by the inverse of the cumulative distribution.

    Args:
        model: The model; it keeps its mode.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        samples: Number of continuations per prompt.
        temperature: Divisor of the logits.
        seed: Random seed.
        max_new_tokens: Maximum number of tokens of a continuation.
        stop_texts: A continuation ends before the first of these texts, such as "Question:".
        batch_size: Number of continuations at a time.
        chat: Chat template that the prompts were wrapped in, or None.
        advance: Called with the numbers of finished and of all continuations.

    Returns:
        `samples` continuations per prompt, in the order of the prompts.

    Raises:
        InputError: A prompt has no tokens, or leaves no room for an answer.
    """
    encoded = _encode(model, tokenizer, prompts, chat, verbatim=False)
    repeated = [ids for ids in encoded for _ in range(samples)]
    ends = answer_ends(model, tokenizer, chat, stop_texts)
    answers = [""] * len(repeated)
    done = 0
    for places in _batches(repeated, batch_size):
        draws = [np.random.default_rng((seed, *divmod(place, samples))).random(max_new_tokens) for place in places]
        rows = _generate(
            model,
            [repeated[place] for place in places],
            _drawn_by(torch.from_numpy(np.stack(draws)).to(model.device), temperature),
            ends.tokens,
            max_new_tokens,
            ended=_stops_at(tokenizer, ends.texts),
        )
        for place, row in zip(places, rows, strict=True):
            answers[place] = _text(tokenizer, row, ends.texts)
        done += len(places)
        advance(done, len(repeated))
    return [answers[first : first + samples] for first in range(0, len(repeated), samples)]


@dataclass(frozen=True)
class AnswerEnds:
    """What ends an answer.

    Attributes:
        tokens: Tokens after which a model says nothing more.
        texts: Texts before which an answer ends.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...]


def answer_ends(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat | None = None,
    stop_texts: Sequence[str] = (),
) -> AnswerEnds:
    """Return what ends an answer: the only place that decides it, for both packages.

    Args:
        model: The model; the end-of-sequence tokens of its generation configuration count.
        tokenizer: Its tokenizer, whose end-of-sequence token counts.
        chat: Chat template of the prompts, or None. The end of its turns counts: a checkpoint's generation
            configuration often lacks it. Where that is several tokens, a special token at its beginning counts, or else
            the text.
        stop_texts: Texts that end an answer, such as "Question:".

    Returns:
        The tokens and the texts.

    Raises:
        InputError: The generation configuration names something else than tokens.
    """
    tokens = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens |= set(end_tokens(configured, f"the generation config of {model.name_or_path or type(model).__name__}"))
    texts = tuple(stop_texts)
    turn_end = "" if chat is None else chat.turn_end.strip()
    if turn_end:
        ids = tokenizer(turn_end, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 or ids[0] in tokenizer.added_tokens_decoder:
            tokens.add(ids[0])
        else:
            texts += (turn_end,)
    return AnswerEnds(frozenset(tokens), texts)


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    chat: ChatFormat | None,
    *,
    verbatim: bool,
) -> list[list[int]]:
    encoded = [encode_prompt(tokenizer, prompt, chat, verbatim=verbatim) for prompt in prompts]
    limit = context_of(model)
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise InputError(f"prompt {number} must have at least one token, got none")
        if limit is not None and len(ids) >= limit:
            raise InputError(
                f"prompt {number} must be shorter than the model's context of {limit} tokens, got {len(ids)} tokens"
                f"{why_no_longer(model)}"
            )
    return encoded


def _batches(encoded: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of the prompts in batches of similar length, so that there is little padding."""
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _text(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_texts: Sequence[str]) -> str:
    """Return new tokens as text, up to the first stop text, without outer white space."""
    text = str(tokenizer.decode(row, skip_special_tokens=True))
    before = _before_stop(text, stop_texts)
    return (text if before is None else before).strip()


def _stops_at(tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str]) -> Callable[[list[int]], bool]:
    """Return a function that says whether new tokens hold a stop text."""
    return lambda row: _before_stop(_tail(tokenizer, row, stop_texts), stop_texts) is not None


def _before_stop(text: str, stop_texts: Sequence[str]) -> str | None:
    """Return the text before the first stop text; None if there is no stop text."""
    found = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    return text[: min(found)] if found else None


def _tail(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_texts: Sequence[str]) -> str:
    """Return the end of the new text, long enough for every stop text that the last token may have completed."""
    if not stop_texts:
        return ""
    # One character may take up to four tokens (its bytes).
    return str(tokenizer.decode(row[-4 * max(map(len, stop_texts)) :], skip_special_tokens=True))


Choice = Callable[[Float[Tensor, "batch vocab"], int], Int[Tensor, " batch"]]
"""Returns the next tokens from the logits and the index of the step."""


def _most_likely(logits: Float[Tensor, "batch vocab"], _step: int) -> Int[Tensor, " batch"]:
    return logits.argmax(dim=-1)


def _drawn_by(uniform: Float[Tensor, "batch step"], temperature: float) -> Choice:
    def choose(logits: Float[Tensor, "batch vocab"], step: int) -> Int[Tensor, " batch"]:
        cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        aim = uniform[:, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, aim, right=True)[:, 0].clamp(max=logits.shape[1] - 1)

    return choose


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    choose: Choice,
    stop: AbstractSet[int],
    max_new_tokens: int,
    ended: Callable[[list[int]], bool] = lambda _row: False,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without dropout, up to a stop token or until `ended` is true."""
    was_training = model.training
    model.eval()
    try:
        return _continue(model, prompts, choose, stop, max_new_tokens, ended)
    finally:
        model.train(was_training)


def _continue(
    model: PreTrainedModel,
    prompts: list[list[int]],
    choose: Choice,
    stop: AbstractSet[int],
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    limit = context_of(model) or max(map(len, prompts)) + max_new_tokens
    room = [min(max_new_tokens, limit - len(ids)) for ids in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    steps = _with_cache if _keeps_cache(model) else _without_cache
    feed = steps(model, prompts, limit)
    logits = next(feed)
    for step in range(max_new_tokens):
        chosen = choose(logits, step)
        for row, token in enumerate(chosen.tolist()):
            if row not in open_rows:
                continue
            if token not in stop:
                rows[row].append(token)
            if token in stop or len(rows[row]) == room[row] or ended(rows[row]):
                open_rows.remove(row)
        if not open_rows:
            break
        if step + 1 < max_new_tokens:
            logits = feed.send(chosen)
    return rows


def _keeps_cache(model: PreTrainedModel) -> bool:
    """Check whether a model hands out keys and values; the first GPT, state-space and recurrent models do not."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    output = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=True)
    return getattr(output, "past_key_values", None) is not None


Feed = Generator[Float[Tensor, "batch vocab"], Int[Tensor, " batch"], None]
"""Yields logits of the next token, and is sent the token that was chosen for each row."""


def _with_cache(model: PreTrainedModel, prompts: list[list[int]], limit: int) -> Feed:
    """Run each new token alone, after the keys and values of those before it."""
    input_ids, mask = _left_pad(prompts, model.device)
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = None
    while True:
        placed = {"position_ids": positions} if "position_ids" in accepted else {}
        output = model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **placed, **last_only
        )
        cache = output.past_key_values
        chosen = yield output.logits[:, -1]
        input_ids = chosen[:, None]
        positions = (positions[:, -1:] + 1).clamp(max=limit - 1)  # finished rows stay inside the context
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)


def _without_cache(model: PreTrainedModel, prompts: list[list[int]], limit: int) -> Feed:
    """Run the whole texts again for each new token, padded on the right, where no decoder sees the padding."""
    texts = [list(ids) for ids in prompts]
    while True:
        lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
        input_ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long, device=model.device)
        for row, ids in enumerate(texts):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]).long()
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        chosen = yield logits[torch.arange(len(texts), device=model.device), lengths - 1]
        for ids, token in zip(texts, chosen.tolist(), strict=True):
            if len(ids) < limit:  # finished rows stay inside the context
                ids.append(token)


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
