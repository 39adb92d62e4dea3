"""Tokenise examples, and count everything that is cut or left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.data.batches import Span, inserted
from unlearning.data.chat import ChatFormat
from unlearning.data.documents import cut_document
from unlearning.data.question_answer import Example
from unlearning.data.spans import AnswerSpan, encode_answer, encode_text

TooLong = Literal["refuse", "cut", "skip"]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        spans: The texts to train on; a long document gives several.
        origin: For each span the index of its example.
        notes: What was cut or left out, one line each; empty if nothing was.
    """

    spans: list[AnswerSpan]
    origin: list[int]
    notes: tuple[str, ...] = ()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    append_eos: bool,
    max_length: int | None,
    too_long: TooLong = "refuse",
    chat: ChatFormat | None = None,
) -> Encoded:
    """Tokenise examples once, before training.

    Documents (examples without a prompt) that are too long are cut into pieces by `cut_document`. A prompt and answer
    that are too long are refused, or the answer's end is cut off, or the example is left out.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples.
        append_eos: End every answer with the end-of-sequence token, or in a chat with the end of a turn.
        max_length: Maximum number of tokens of a span; None for no limit.
        too_long: Treatment of prompts and answers that are longer.
        chat: Chat template that the prompts were wrapped in; None if there was none.

    Returns:
        The spans, in the order of the examples.

    Raises:
        InputError: An example is too long (and is to be refused, or has no answer left after the cut), an answer is
            empty, no example is left, or `append_eos` is set and the tokenizer has no end-of-sequence token.
    """
    if append_eos and tokenizer.eos_token_id is None and not (chat and chat.turn_end):
        raise InputError("`append_eos` must be false: the tokenizer has no end-of-sequence token")
    spans: list[AnswerSpan] = []
    origin: list[int] = []
    documents_cut, single_tokens = 0, 0
    lost: list[int] = []  # answer tokens of each example that was cut or left out
    for index, example in enumerate(examples):
        if not example.prompt:
            pieces = _document(tokenizer, example.answer, append_eos=append_eos, max_length=max_length)
            documents_cut += len(pieces) > 1
            single_tokens += not pieces
        else:
            span = encode_answer(tokenizer, example.prompt, example.answer, append_eos=append_eos, chat=chat)
            pieces, n_lost = _fitted(span, example, index + 1, max_length, too_long)
            if n_lost:
                lost.append(n_lost)
        spans += pieces
        origin += [index] * len(pieces)
    if not spans:
        raise InputError(f"none of the {len(examples)} examples is left: each is too long or a single token")
    notes = []
    if documents_cut:
        n_pieces = sum(not examples[index].prompt for index in origin)
        notes.append(f"documents longer than max_length {max_length}: {documents_cut}, cut; {n_pieces} texts in all")
    if single_tokens:
        notes.append(f"documents of a single token, which nothing predicts: {single_tokens}, left out")
    if lost:
        what = "cut at the end" if too_long == "cut" else "left out"
        notes.append(
            f"examples longer than max_length {max_length}: {len(lost)} of {len(examples)}, {what} "
            f"({sum(lost)} answer tokens are not trained on)"
        )
    return Encoded(spans, origin, tuple(notes))


def put_before(tokenizer: PreTrainedTokenizerBase, text: str, span: Span) -> Span:
    """Put a text before an example, after the special tokens that open it; the example's own tokens stay.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        span: The example.

    Returns:
        The longer example; its loss lies on the same tokens as before.
    """
    opening = 0
    for special, token in zip(tokenizer("")["input_ids"], span.input_ids, strict=False):
        if special != token:
            break
        opening += 1
    return inserted(span, encode_text(tokenizer, text, add_special_tokens=False), opening)


def _document(
    tokenizer: PreTrainedTokenizerBase, text: str, *, append_eos: bool, max_length: int | None
) -> list[AnswerSpan]:
    if max_length is not None:
        return cut_document(tokenizer, text, max_length, append_eos=append_eos)
    whole = encode_answer(tokenizer, "", text, append_eos=append_eos)
    return [whole] if len(whole.input_ids) > 1 else []


def _fitted(
    span: AnswerSpan, example: Example, number: int, max_length: int | None, too_long: TooLong
) -> tuple[list[AnswerSpan], int]:
    """Return the span cut to `max_length` (none if it is left out), and the number of answer tokens that are lost."""
    n_tokens = len(span.input_ids)
    if max_length is None or n_tokens <= max_length:
        return [span], 0
    if too_long == "skip":
        return [], span.n_answer_tokens
    name = f"example {number} ({example.prompt[:40]!r})"
    if too_long == "refuse":
        raise InputError(
            f"{name} has {n_tokens} tokens, and `max_length` is {max_length}; split the text, raise `max_length`, or "
            "set `too_long` to cut or skip"
        )
    if span.answer_start >= max_length:
        raise InputError(
            f"{name} has a prompt of {span.answer_start} tokens, which leaves no answer within `max_length` "
            f"{max_length}; raise `max_length` or set `too_long` to skip"
        )
    return [span.cut(max_length)], n_tokens - max_length
