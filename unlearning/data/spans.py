"""The boundary between prompt and answer, in tokens.

Training, evaluation and `dissect` all find the boundary here, so that the tokens trained are the tokens measured.
"""

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.data.chat import ChatFormat

_MARKS = {" ": "Ġ▁ ", "\n": "Ċ\n", "\t": "ĉ\t"}
"""How vocabularies write white space at the beginning of a token."""

_PROBES = 6
"""Number of answers that are tried after white space."""

_SPACES = 8
"""Number of closing spaces that are looked at one by one."""


@dataclass(frozen=True)
class AnswerSpan:
    """One tokenised prompt and answer.

    Attributes:
        input_ids: The tokens of prompt and answer together.
        answer_start: Index of the answer's first token. A token that holds the end of the prompt and the beginning of
            the answer counts as the answer's.
        n_closing: Number of tokens at the end that were put there to close the answer (end of sequence, or end of a
            chat's turn) and are no part of its text.
    """

    input_ids: list[int]
    answer_start: int
    n_closing: int = 0

    @property
    def n_answer_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.input_ids) - self.answer_start

    def cut(self, length: int) -> "AnswerSpan":
        """Return the span without the tokens after the first `length`."""
        lost = max(0, len(self.input_ids) - length)
        return AnswerSpan(self.input_ids[:length], self.answer_start, max(0, self.n_closing - lost))

    def without_closing(self) -> "AnswerSpan":
        """Return the span without the tokens that close the answer."""
        return self.cut(len(self.input_ids) - self.n_closing)


def join_answer(prompt: str, answer: str, chat: ChatFormat | None = None) -> str:
    """Join prompt and answer to one text.

    One space is put between them if neither side has white space; in a chat, the white space that the template has
    there.

    Args:
        prompt: The prompt, or "".
        answer: The answer.
        chat: Chat template that the prompt was wrapped in, or None.

    Returns:
        The text.
    """
    if chat is not None and prompt:
        answer = answer.strip()
        if chat.separator is not None:
            return prompt + chat.separator + answer
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return prompt + answer
    return f"{prompt} {answer}"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Tokenise a text; special tokens that it begins with already are not put in front of it a second time.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        add_special_tokens: Let the tokenizer add its special tokens.

    Returns:
        The tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    if not add_special_tokens:
        return ids
    added = 0  # tokens in front of every text, such as the beginning of a sequence
    for mine, theirs in zip(tokenizer("")["input_ids"], ids, strict=False):
        if mine != theirs:
            break
        added += 1
    return ids[added:] if ids[:added] == ids[added : 2 * added] else ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: ChatFormat | None = None, *, verbatim: bool = False
) -> list[int]:
    """Tokenise a prompt that a model is to continue.

    Where the white space that a prompt ends with would be a part of its answer's first token, as in `Answer: Oslo`, it
    is left to the model. A chat template's closing white space stays.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        chat: Chat template that the prompt was wrapped in, or None.
        verbatim: Keep all closing white space.

    Returns:
        The tokens; the end-of-sequence token that some tokenizers close every text with is not among them.
    """
    if chat is not None or verbatim:
        return _open_ended(tokenizer, prompt, add_special_tokens=chat is None)
    bare = prompt.rstrip()
    for end in range(len(prompt), max(len(bare), len(prompt) - _SPACES), -1):
        ids = _open_ended(tokenizer, prompt[:end])
        answers = _after_space(tokenizer, prompt[-1])
        if all(_open_ended(tokenizer, prompt + answer)[: len(ids)] == ids for answer in answers):
            return ids
    return _open_ended(tokenizer, bare or prompt)


@lru_cache(maxsize=16)
def _after_space(tokenizer: PreTrainedTokenizerBase, space: str) -> tuple[str, ...]:
    """Return a few texts that are one token of the vocabulary together with the white space before them."""
    marks = _MARKS.get(space, space)
    words = (token[1:] for token in tokenizer.get_vocab() if len(token) > 1 and token[0] in marks)
    found = {word for word in words if word.isascii() and word.isprintable() and not word[0].isspace()}
    return tuple(sorted(found, key=lambda word: (not word.isalnum(), len(word), word))[:_PROBES])


def _open_ended(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    ids = encode_text(tokenizer, text, add_special_tokens=add_special_tokens)
    eos = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    *,
    add_special_tokens: bool = True,
    append_eos: bool = False,
    chat: ChatFormat | None = None,
) -> AnswerSpan:
    """Tokenise prompt and answer, and find the answer's first token.

    The prompt alone and prompt + answer are both tokenised; the answer starts at the first token in which the two
    differ. The length of the prompt's own tokens would be off by one whenever a token crosses the boundary.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt; empty for a plain text.
        answer: The answer.
        add_special_tokens: Let the tokenizer add its special tokens. In a chat the prompt holds them already, so none
            are added.
        append_eos: End the answer with the end-of-sequence token; in a chat, with the template's end of a turn. An
            answer that ends so already is left as it is.
        chat: Chat template that the prompt was wrapped in, or None.

    Returns:
        The tokens and the index of the answer's first one.

    Raises:
        InputError: The answer is empty, or no token belongs to it alone.
    """
    if not answer.strip():
        raise InputError(f"the answer to {prompt[-60:]!r} is empty; remove the record or give an answer")
    text, turn_end = join_answer(prompt, answer, chat), ""
    if chat is not None and prompt:
        add_special_tokens = False
        turn_end = chat.turn_end if append_eos else ""
    full = bare = encode_text(tokenizer, text, add_special_tokens=add_special_tokens)
    if not text.endswith(turn_end):
        full = encode_text(tokenizer, text + turn_end, add_special_tokens=add_special_tokens)
    before = encode_text(tokenizer, prompt, add_special_tokens=add_special_tokens)
    eos = tokenizer.eos_token_id
    # Some tokenizers close every text with the end-of-sequence token, which is not part of the answer.
    if full and full[-1] == eos and before and before[-1] == eos:
        full = bare = full[:-1]
    start = 0
    for ours, theirs in zip(before, full, strict=False):
        if ours != theirs:
            break
        start += 1
    if append_eos and not turn_end and eos is not None and full[-1:] != [eos]:
        full = [*full, eos]
    if start >= len(full):
        raise InputError(f"the answer {answer!r} has no tokens of its own after {prompt[-60:]!r}")
    return AnswerSpan(input_ids=list(full), answer_start=start, n_closing=len(full) - len(bare))
