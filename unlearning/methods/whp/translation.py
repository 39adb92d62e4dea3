"""A text T and its generic translation T', and which tokens of the two stand at the same position of the story.

One model has read T up to a token and is asked for the next; another has read T' up to the aligned token. Alignment
uses characters: a token of T that starts at s is aligned with the token of T' that starts at map(s). Inside a replaced
anchor there is no such position, and the pieces of its k-th word are aligned with those of the replacement's k-th word.
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
        edits: The replacements, from left to right, in characters of T.
    """

    source: str
    target: str
    edits: tuple[Occurrence, ...]

    def map(self, position: int) -> int | None:
        """Map a character position of T to T'.

        Args:
            position: Position in T.

        Returns:
            The position in T'; the start of an edit maps to that of its replacement, and positions inside it to None.
        """
        index = bisect_right(self._starts, position) - 1
        if index < 0:
            return position
        edit, replaced = self.edits[index], self.replaced[index]
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
        aligned: For each token of T the aligned token of T', or None; strictly increasing where not None.
        edit: For each token of T the index of the edit that it has characters of, or None.
        cuts: The tokens of T, with their aligned ones, before which both texts can be cut without cutting an anchor or
            a character apart.
    """

    aligned: list[int | None]
    edit: list[int | None]
    cuts: list[tuple[int, int]]


def align(translation: Translation, source: Sequence[Span], target: Sequence[Span]) -> AlignedTokens:
    """Align the tokens of T with those of T'.

    Args:
        translation: T and T'.
        source: Character offsets of the tokens of T, from left to right.
        target: Character offsets of the tokens of T', from left to right.

    Returns:
        The alignment.
    """
    by_start: dict[int, list[int]] = {}
    for token, (start, _) in enumerate(target):
        by_start.setdefault(start, []).append(token)
    wanted: list[int | None] = [None] * len(source)
    cuts = []
    nth = 0
    for token, (start, _) in enumerate(source):
        # Tokens share a start if they are pieces of one character.
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
    """Yield the j-th piece of an anchor's k-th word with that of the replacement's k-th word, if both exist."""
    target_edit = _edit_of_tokens(translation.replaced, target)
    source_pieces, target_pieces = _tokens_of_edits(edit), _tokens_of_edits(target_edit)
    for index, (occurrence, (start, end)) in enumerate(zip(translation.edits, translation.replaced, strict=True)):
        theirs = _words(translation.source, (occurrence.start, occurrence.end))
        ours = _words(translation.target, (start, end))
        for word, generic_word in zip(theirs, ours, strict=False):
            pieces = _overlapping(source_pieces.get(index, []), source, word)
            generic_pieces = _overlapping(target_pieces.get(index, []), target, generic_word)
            for token, piece in zip(pieces, generic_pieces, strict=False):
                if source[token][0] >= occurrence.start:  # a token that starts before the anchor is aligned already
                    yield token, piece


def _words(text: str, span: Span) -> list[Span]:
    return [match.span() for match in _WORD.finditer(text, *span)]


def _overlapping(tokens: Iterable[int], spans: Sequence[Span], word: Span) -> list[int]:
    return [token for token in tokens if spans[token][0] < word[1] and spans[token][1] > word[0]]


def _edit_of_tokens(edits: Sequence[Span], tokens: Sequence[Span]) -> list[int | None]:
    """Return, for each token, the index of the first edit that it has characters of, or None."""
    indices: list[int | None] = []
    index = 0
    for start, end in tokens:
        while index < len(edits) and edits[index][1] <= start:
            index += 1
        indices.append(index if index < len(edits) and edits[index][0] < end else None)
    return indices


def _tokens_of_edits(edit: Sequence[int | None]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for token, index in enumerate(edit):
        if index is not None:
            tokens.setdefault(index, []).append(token)
    return tokens


def _increasing(wanted: Sequence[int | None]) -> list[int | None]:
    """Replace by None every piece that would go back or be used twice."""
    kept: list[int | None] = []
    last = -1
    for piece in wanted:
        keep = piece is not None and piece > last
        kept.append(piece if keep else None)
        last = piece if piece is not None and keep else last
    return kept
