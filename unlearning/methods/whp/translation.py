"""A text T and its generic translation T', and which token of the one stands where a token of the other does.

One model has read T up to a token and is asked what comes next; so is another that has read T' up to the aligned token.
Alignment goes by characters: a token of T that starts at s is aligned with the token of T' that starts at map(s). Where
an anchor is replaced there is no such s inside, and the pieces of its k-th word are aligned with those of the
replacement's k-th word.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from unlearning.methods.whp.anchors import Anchors, Occurrence

Span = tuple[int, int]
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Translation:
    """A text in which every anchor is replaced.

    Attributes:
        source: T.
        target: T'.
        edits: what was replaced, from left to right, in characters of T.
    """

    source: str
    target: str
    edits: tuple[Occurrence, ...]

    def map(self, position: int) -> int | None:
        """Where a character position of T is in T': the start of an edit at that of its replacement, None inside."""
        place = bisect_right(self._starts, position) - 1
        if place < 0:
            return position
        edit, replaced = self.edits[place], self.replaced[place]
        if position == edit.start:
            return replaced[0]
        return None if position < edit.end else replaced[1] + position - edit.end

    @cached_property
    def replaced(self) -> list[Span]:
        """Each edit's replacement, in characters of T'."""
        spans = []
        shift = 0
        for edit in self.edits:
            start = edit.start + shift
            spans.append((start, start + len(edit.replacement)))
            shift += len(edit.replacement) - (edit.end - edit.start)
        return spans

    @cached_property
    def _starts(self) -> list[int]:
        return [edit.start for edit in self.edits]


def translate(text: str, anchors: Anchors) -> Translation:
    """Replace every anchor of the text by its generic counterpart."""
    edits = anchors.find(text)
    pieces = []
    end = 0
    for edit in edits:
        pieces += [text[end : edit.start], edit.replacement]
        end = edit.end
    return Translation(source=text, target="".join([*pieces, text[end:]]), edits=tuple(edits))


@dataclass(frozen=True)
class AlignedTokens:
    """Tokens of T against tokens of T'.

    Attributes:
        aligned: for each token of T the aligned token of T', or None; strictly increasing where there is one.
        edit: for each token of T the place of the edit that it has characters of, or None.
        cuts: the tokens of T, with their aligned ones, before which both texts can be cut in two: no anchor and no
            character is cut apart.
    """

    aligned: list[int | None]
    edit: list[int | None]
    cuts: list[tuple[int, int]]


def align(translation: Translation, source: Sequence[Span], target: Sequence[Span]) -> AlignedTokens:
    """Align the tokens of T with those of T', given by their character offsets, both from left to right."""
    by_start: dict[int, list[int]] = {}
    for token, (start, _) in enumerate(target):
        by_start.setdefault(start, []).append(token)
    wanted: list[int | None] = [None] * len(source)
    cuts = []
    nth = 0
    for token, (start, _) in enumerate(source):
        # Tokens may share a start: pieces of one character.
        nth = nth + 1 if token and start == source[token - 1][0] else 0
        mapped = translation.map(start)
        candidates = [] if mapped is None else by_start.get(mapped, [])
        if nth < len(candidates):
            wanted[token] = candidates[nth]
            if nth == 0:
                cuts.append((token, candidates[0]))
    edit = _edit_of_tokens([(edit.start, edit.end) for edit in translation.edits], source)
    for token, piece in _paired_pieces(translation, edit, source, target):
        if wanted[token] is None:
            wanted[token] = piece
    aligned = _increasing(wanted)
    return AlignedTokens(aligned, edit, cuts=[(token, piece) for token, piece in cuts if aligned[token] == piece])


def _paired_pieces(
    translation: Translation, edit: Sequence[int | None], source: Sequence[Span], target: Sequence[Span]
) -> Iterable[tuple[int, int]]:
    """The j-th piece of an anchor's k-th word with the j-th piece of the replacement's k-th word, where both exist."""
    target_edit = _edit_of_tokens(translation.replaced, target)
    source_pieces, target_pieces = _tokens_of_edits(edit), _tokens_of_edits(target_edit)
    for place, (occurrence, (start, end)) in enumerate(zip(translation.edits, translation.replaced, strict=True)):
        theirs = _words(translation.source, (occurrence.start, occurrence.end))
        ours = _words(translation.target, (start, end))
        for word, generic_word in zip(theirs, ours, strict=False):
            pieces = _overlapping(source_pieces.get(place, []), source, word)
            generic_pieces = _overlapping(target_pieces.get(place, []), target, generic_word)
            for token, piece in zip(pieces, generic_pieces, strict=False):
                if source[token][0] >= occurrence.start:  # else it is aligned by its start, before the anchor
                    yield token, piece


def _words(text: str, span: Span) -> list[Span]:
    return [match.span() for match in _WORD.finditer(text, *span)]


def _overlapping(tokens: Iterable[int], spans: Sequence[Span], word: Span) -> list[int]:
    return [token for token in tokens if spans[token][0] < word[1] and spans[token][1] > word[0]]


def _edit_of_tokens(edits: Sequence[Span], tokens: Sequence[Span]) -> list[int | None]:
    """The first of the edits that each token has characters of."""
    places: list[int | None] = []
    place = 0
    for start, end in tokens:
        while place < len(edits) and edits[place][1] <= start:
            place += 1
        places.append(place if place < len(edits) and edits[place][0] < end else None)
    return places


def _tokens_of_edits(edit: Sequence[int | None]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for token, place in enumerate(edit):
        if place is not None:
            tokens.setdefault(place, []).append(token)
    return tokens


def _increasing(wanted: Sequence[int | None]) -> list[int | None]:
    """The same without what would go back or be used twice."""
    kept: list[int | None] = []
    last = -1
    for piece in wanted:
        keep = piece is not None and piece > last
        kept.append(piece if keep else None)
        last = piece if piece is not None and keep else last
    return kept
