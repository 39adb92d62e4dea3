"""From examples to tokens, with everything that was cut or left out counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat
from unlearning.data.documents import cut_document
from unlearning.data.question_answer import Example
from unlearning.data.spans import AnswerSpan, encode_answer

TooLong = Literal["refuse", "cut", "skip"]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        spans: what is trained on. A long document is several.
        origin: for each span, the place of its example.
        notes: what was cut or left out, one line each; empty where nothing was.
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

    Documents (examples without a prompt) that are too long are cut into pieces by `cut_document`. Too long a prompt
    and answer are refused, or the answer's end is cut off, or the example is left out.

    Args:
        tokenizer: of the model.
        examples: to tokenise.
        append_eos: end every answer with the end-of-sequence token, or in a chat with the template's end of a turn.
        max_length: tokens of the longest span; None for no limit.
        too_long: what happens to prompts and answers that are longer.
        chat: what the prompts were wrapped by, where it was a chat template.

    Raises:
        InputError: an example is too long (and is to be refused, or has no answer left after the cut), an answer is
            empty, nothing is left, or the end-of-sequence token is to be appended and the tokenizer has none.
    """
    if append_eos and tokenizer.eos_token_id is None and not (chat and chat.turn_end):
        raise InputError("the tokenizer has no end-of-sequence token; set append_eos=false, or give it one")
    spans: list[AnswerSpan] = []
    origin: list[int] = []
    documents_cut, single_tokens = 0, 0
    lost: list[int] = []  # answer tokens of each example that was cut or left out
    for place, example in enumerate(examples):
        if not example.prompt:
            pieces = _document(tokenizer, example.answer, append_eos=append_eos, max_length=max_length)
            documents_cut += len(pieces) > 1
            single_tokens += not pieces
        else:
            span = encode_answer(tokenizer, example.prompt, example.answer, append_eos=append_eos, chat=chat)
            pieces, n_lost = _fitted(span, example, place + 1, max_length, too_long)
            if n_lost:
                lost.append(n_lost)
        spans += pieces
        origin += [place] * len(pieces)
    if not spans:
        raise InputError(f"none of the {len(examples)} examples is left: all are too long or single tokens")
    notes = []
    if documents_cut:
        n_pieces = sum(not examples[place].prompt for place in origin)
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
    """The span as far as it fits, and how many answer tokens that loses."""
    n_tokens = len(span.input_ids)
    if max_length is None or n_tokens <= max_length:
        return [span], 0
    if too_long == "skip":
        return [], span.n_answer_tokens
    name = f"example {number} ({example.prompt[:40]!r})"
    if too_long == "refuse":
        raise InputError(
            f"{name} has {n_tokens} tokens, more than max_length {max_length}; split the text or raise max_length, or "
            "set too_long=cut or too_long=skip"
        )
    if span.answer_start >= max_length:
        raise InputError(
            f"{name} has a prompt of {span.answer_start} tokens, which leaves no answer within max_length "
            f"{max_length}; raise max_length or set too_long=skip"
        )
    return [replace(span, input_ids=span.input_ids[:max_length])], n_tokens - max_length
