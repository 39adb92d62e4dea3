"""Texts cut into blocks of tokens, each with its translation and with the reasons why tokens are not trained on."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError, check_at_least
from unlearning.methods.whp.anchors import Anchors, Occurrence
from unlearning.methods.whp.translation import AlignedTokens, Span, Translation, align, translate

Reason = Literal["", "start", "repeat", "anchor", "unaligned"]
"""Reason for a token without label: "start", nothing predicts a block's first token; "repeat", it belongs to the second
or a later occurrence of an anchor ("Mira" after "Mira Vell" is one, if both are anchors, and so is its "Mira" after
"Mira"); "anchor", it lies inside an anchor and the replacement has no piece for it;
"unaligned", no token of the translation starts at its position; "", the token has a label."""


@dataclass(frozen=True)
class Use:
    """The first use of an anchor in a block.

    Attributes:
        token: The last token of the occurrence; behind it the anchor counts as seen.
        first_tokens: The tokens that the anchor's counterpart may begin with.
    """

    token: int
    first_tokens: frozenset[int]


@dataclass(frozen=True)
class Block:
    """A block of T and the same part of T'.

    Attributes:
        source: Token ids of T, with the tokenizer's opening special tokens.
        target: Token ids of T', likewise.
        aligned: For each token of T the aligned token of T', or None; strictly increasing where not None.
        reasons: For each token of T the reason why it has no label, or "".
        anchors: For each token of T the anchor that it has characters of, or "".
        uses: The first uses of the block's anchors, from left to right.
        n_occurrences: Number of occurrences of anchors in the block, second and later ones included.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    aligned: tuple[int | None, ...]
    reasons: tuple[Reason, ...]
    anchors: tuple[str, ...]
    uses: tuple[Use, ...]
    n_occurrences: int


def cut_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], anchors: Anchors, *, block_size: int
) -> list[Block]:
    """Cut each text into blocks of at most `block_size` tokens, special tokens included, both in T and in T'.

    Texts are tokenised whole and cut between tokens, never inside an anchor. Blocks are as long as that allows; the
    last block of a text holds the remainder. A single remaining token, which nothing would predict, is left out.

    Args:
        tokenizer: A fast tokenizer, which gives character offsets.
        texts: The text to forget.
        anchors: The anchor dictionary.
        block_size: Maximum number of tokens.

    Returns:
        The blocks, in the order of the texts.

    Raises:
        InputError: The tokenizer has no offsets, there is no text, no anchor occurs in any text, or an anchor does not
            fit into a block.
    """
    if not tokenizer.is_fast:
        raise InputError("the tokenizer is slow and has no character offsets; load the fast one (tokenizer.json)")
    if not any(text.strip() for text in texts):
        raise InputError("the texts are empty; give the text to forget")
    opening = _opening(tokenizer)
    check_at_least("block_size", block_size, len(opening) + 2)  # one token that predicts another
    translations = [translate(text, anchors) for text in texts]
    if not any(translation.edits for translation in translations):
        shown = ", ".join(repr(anchor) for anchor in list(anchors.generics)[:3])
        raise InputError(
            f"the anchor dictionary changes nothing: none of its {len(anchors.generics)} anchors ({shown}, ...) occurs "
            "in the text to forget; check the spelling, or that text and dictionary belong together"
        )
    first_tokens = _FirstTokens(tokenizer)
    blocks = [
        block
        for translation in translations
        for block in _blocks_of_text(tokenizer, translation, opening, block_size, first_tokens)
    ]
    if not blocks:
        raise InputError("the texts are one token each, which nothing predicts; give longer texts to forget")
    return blocks


def _blocks_of_text(
    tokenizer: PreTrainedTokenizerBase,
    translation: Translation,
    opening: tuple[int, ...],
    block_size: int,
    first_tokens: "_FirstTokens",
) -> Iterator[Block]:
    source, source_spans = encode_spans(tokenizer, translation.source)
    target, target_spans = encode_spans(tokenizer, translation.target)
    tokens = align(translation, source_spans, target_spans)
    room = block_size - len(opening)
    for (first, target_first), (last, target_last) in _pieces(tokens, len(source), len(target), room):
        if len(opening) + last - first < 2:
            continue
        uses, reasons, n_occurrences = _uses(translation, tokens, source_spans, (first, last), first_tokens)
        shift = len(opening) - target_first
        aligned: list[int | None] = list(range(len(opening)))
        for index, piece in enumerate(tokens.aligned[first:last]):
            aligned.append(None if piece is None else piece + shift)
            if piece is None and not reasons[index]:
                reasons[index] = "unaligned" if tokens.edit[first + index] is None else "anchor"
        anchors = ["" if edit is None else translation.edits[edit].anchor for edit in tokens.edit[first:last]]
        yield Block(
            source=(*opening, *source[first:last]),
            target=(*opening, *target[target_first:target_last]),
            aligned=tuple(aligned),
            # Nothing predicts the first token, and special tokens are not trained on.
            reasons=(*_starts(len(opening)), *reasons) if opening else ("start", *reasons[1:]),
            anchors=(*[""] * len(opening), *anchors),
            uses=tuple(Use(use.token - first + len(opening), use.first_tokens) for use in uses),
            n_occurrences=n_occurrences,
        )


def _uses(
    translation: Translation,
    tokens: AlignedTokens,
    spans: Sequence[Span],
    piece: tuple[int, int],
    first_tokens: "_FirstTokens",
) -> tuple[list[Use], list[Reason], int]:
    """Find the first uses of anchors among the tokens of a piece, the tokens of later uses, and the number of uses."""
    first, last = piece
    edits: dict[int, list[int]] = {}
    for token in range(first, last):
        index = tokens.edit[token]
        if index is not None:
            edits.setdefault(index, []).append(token)
    reasons: list[Reason] = [""] * (last - first)
    uses = []
    seen: set[str] = set()
    for index, inside in edits.items():
        edit = translation.edits[index]
        repeated = [(start, end) for start, end, anchor in edit.inside if anchor in seen]
        if edit.anchor in seen:
            repeated = [(edit.start, edit.end)]
        else:
            uses.append(Use(inside[-1], first_tokens(edit)))
        for token in inside:
            if any(spans[token][0] < end and spans[token][1] > start for start, end in repeated):
                reasons[token - first] = "repeat"
        seen |= {edit.anchor, *(anchor for _, _, anchor in edit.inside)}
    return uses, reasons, len(edits)


def _starts(n_tokens: int) -> list[Reason]:
    return ["start"] * n_tokens


def _pieces(
    tokens: AlignedTokens, n_source: int, n_target: int, room: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield begin and end of each block in tokens of T and of T': the furthest cut that leaves both within the room."""
    begin, end = (0, 0), (n_source, n_target)
    sources, targets = [cut[0] for cut in tokens.cuts], [cut[1] for cut in tokens.cuts]
    while end[0] - begin[0] > room or end[1] - begin[1] > room:
        furthest = min(bisect_right(sources, begin[0] + room), bisect_right(targets, begin[1] + room)) - 1
        if furthest < 0 or tokens.cuts[furthest] == begin:
            raise InputError(f"an anchor or its counterpart does not fit into {room} tokens; raise `block_size`")
        yield begin, tokens.cuts[furthest]
        begin = tokens.cuts[furthest]
    if begin != end:
        yield begin, end


def encode_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Tokenise a text without special tokens.

    Args:
        tokenizer: A fast tokenizer.
        text: The text.

    Returns:
        The token ids, and the first and last (exclusive) character of each.
    """
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    return list(encoded["input_ids"]), [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before a text."""
    encoded: Any = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    return tuple(ids[: special.index(0)])


class _FirstTokens:
    """The tokens that a counterpart may begin with: inside a text, at its beginning, or behind a quotation mark."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Create an empty cache."""
        self.tokenizer = tokenizer
        self.known: dict[str, frozenset[int]] = {}

    def __call__(self, use: Occurrence) -> frozenset[int]:
        """Return the tokens of the first word that differs from the anchor's: "the Guild" must not lower "the"."""
        theirs, words = use.anchor.split(), use.replacement.split()
        while theirs and words and theirs[0].casefold() == words[0].casefold():
            theirs, words = theirs[1:], words[1:]
        text = " ".join(words)
        if text not in self.known:
            self.known[text] = frozenset(self._first_tokens(text))
        return self.known[text]

    def _first_tokens(self, text: str) -> Iterator[int]:
        for before in ("", "a ", '"') if text else ():
            ids, spans = encode_spans(self.tokenizer, before + text)
            for token, (start, end) in zip(ids, spans, strict=True):
                # A token of white space alone begins other words as well, so it is passed over.
                if start <= len(before) < end and str(self.tokenizer.decode([token])).strip():
                    if not before[start:].strip():  # a token with the quotation mark does not count
                        yield token
                    break
