"""The anchor dictionary: expressions that only the target text uses, and the generic counterpart of each."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.records import read_records, read_text

_WORD = re.compile(r"\w+")
_APOSTROPHES = ("'", "’")


@dataclass(frozen=True)
class Occurrence:
    """An anchor found in a text.

    Attributes:
        start: First character that is replaced.
        end: End of the characters that are replaced, exclusive.
        anchor: The dictionary's entry, whatever variant of it the text has.
        replacement: The generic counterpart in the variant of the text.
        inside: Other anchors that lie within this one, as (first character, end, entry).
    """

    start: int
    end: int
    anchor: str
    replacement: str
    inside: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class Anchors:
    """A checked anchor dictionary.

    An entry also stands for its variants: with the first letter, the first letters of all words or everything in
    capitals; the plural; the possessive. A capitalised anchor is not searched in small letters, because many names are
    words ("Stone"); add the word as an entry of its own if it is an anchor, and likewise an irregular plural. An entry
    takes precedence over another entry's variant.

    Attributes:
        generics: Generic counterpart by anchor; runs of white space are single spaces.

    Raises:
        InputError: The dictionary is empty, one side of an entry is empty, an anchor is its own counterpart or does not
            begin with a letter or a digit, or a counterpart holds an anchor.
    """

    generics: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check the dictionary."""
        generics = {_spaced(anchor): _spaced(generic) for anchor, generic in self.generics.items()}
        if not generics:
            raise InputError("the anchor dictionary is empty; give at least one anchor and its generic counterpart")
        if len(generics) < len(self.generics):
            _refuse_duplicates(_spaced(anchor) for anchor in self.generics)
        for anchor, generic in generics.items():
            if not anchor or not generic:
                side, other = ("anchor", generic) if not anchor else ("generic counterpart", anchor)
                raise InputError(f"the {side} of {other!r} is empty; fill it in or remove the entry")
            if not _WORD.match(anchor):
                raise InputError(f"anchor {anchor!r}: must begin with a letter or a digit")
            if anchor.casefold() == generic.casefold():
                raise InputError(
                    f"anchor {anchor!r} is its own generic counterpart; choose another or remove the entry"
                )
        object.__setattr__(self, "generics", generics)
        for anchor, generic in generics.items():
            inside = self.find(generic)
            if inside:
                raise InputError(
                    f"the generic counterpart {generic!r} of {anchor!r} holds the anchor {inside[0].anchor!r}; "
                    "choose another counterpart"
                )

    def find(self, text: str) -> list[Occurrence]:
        """Find the occurrences of anchors in a text, from left to right.

        Of anchors that overlap, the longest is replaced, and of equally long ones the first; anchors inside of it are
        named but not replaced.

        Args:
            text: The text.

        Returns:
            Whole words only; occurrences do not overlap.
        """
        found: list[Occurrence] = []
        group: list[Occurrence] = []  # overlaps with the next candidate, perhaps
        end = 0
        for candidate in self._candidates(text):
            if candidate.start >= end:
                found += _longest(group)
                group = []
            group.append(candidate)
            end = max(end, candidate.end)
        return found + _longest(group)

    def _candidates(self, text: str) -> Iterator[Occurrence]:
        """Yield every variant at every place, from left to right."""
        for word in _WORD.finditer(text):
            start = word.start()
            # "Mira" in O'Mira is only part of a word.
            if text[start - 1 : start] in _APOSTROPHES and text[start - 2 : start - 1].isalnum():
                continue
            for form in self._forms.get(word.group(), ()):
                match = form.pattern.match(text, start)
                if match:
                    yield _occurrence(form, text, start, match.end())

    @cached_property
    def _forms(self) -> dict[str, list["_Form"]]:
        """Every variant by its first word, the longest first."""
        forms = {anchor: _Form(anchor, anchor, generic) for anchor, generic in self.generics.items()}
        for anchor, generic in self.generics.items():
            numbers = [(anchor, generic)]
            numbers += [(plural, _plurals(generic)[0]) for plural in _plurals(anchor) if _plurals(generic)]
            for written, replacement in numbers:
                for case in _CASES:
                    forms.setdefault(case(written), _Form(case(written), anchor, case(replacement)))
        by_first_word: dict[str, list[_Form]] = {}
        for form in sorted(forms.values(), key=lambda form: -len(form.written)):
            first = _WORD.match(form.written)
            assert first is not None  # an anchor begins with a word, and its variants change the case alone
            by_first_word.setdefault(first.group(), []).append(form)
        return by_first_word


def read_anchors(path: str | Path) -> Anchors:
    """Read an anchor dictionary: a JSON object {"anchor": "generic", ...}, or records with `anchor` and `generic`.

    Args:
        path: A .json file of an object or a list of records, or a .jsonl, .csv, .tsv or .parquet file of records.

    Returns:
        The checked dictionary.

    Raises:
        InputError: The file is missing or broken, an anchor is given twice, or `Anchors` refuses an entry.
    """
    path = Path(path)
    pairs = _read_records(path) if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet") else _read_json(path)
    try:
        _refuse_duplicates(_spaced(anchor) for anchor, _ in pairs)
        return Anchors(dict(pairs))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_anchors(path: str | Path, generics: Mapping[str, str]) -> None:
    """Write a dictionary as a JSON object, one entry per line, for a person to read and correct."""
    Path(path).write_text(json.dumps(dict(generics), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Form:
    """A variant of an anchor that a text may have."""

    written: str
    anchor: str
    replacement: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The variant before a word boundary, with any white space (such as a line break) between its words."""
        # Compiled when a text has its first word: there are thousands of variants, and a text has few.
        return re.compile(r"\s+".join(re.escape(word) for word in self.written.split()) + r"(?!\w)")


def _longest(overlapping: Sequence[Occurrence]) -> list[Occurrence]:
    """Return the occurrences that remain, from left to right, when longer ones go first."""
    chosen: list[Occurrence] = []
    for candidate in sorted(overlapping, key=lambda each: (each.start - each.end, each.start)):
        if all(candidate.end <= other.start or candidate.start >= other.end for other in chosen):
            inner = {
                (other.start, other.end, other.anchor)
                for other in overlapping
                if candidate.start <= other.start and other.end <= candidate.end and other.anchor != candidate.anchor
            }
            chosen.append(replace(candidate, inside=tuple(sorted(inner))))
    return sorted(chosen, key=lambda each: each.start)


def _occurrence(form: _Form, text: str, start: int, end: int) -> Occurrence:
    replacement = form.replacement
    # "Boris' hat" becomes "Anna's hat". An 's stays, and so does an apostrophe that closes a quotation.
    bare = text[end : end + 1] in _APOSTROPHES and re.compile(r"\s+\w").match(text, end + 1)
    if bare and text[end - 1] in "sS" and replacement[-1] not in "sS":
        replacement += text[end] + ("S" if replacement.isupper() else "s")
        end += 1
    return Occurrence(start, end, form.anchor, replacement)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _titled(text: str) -> str:
    return " ".join(map(_capitalised, text.split()))


_CASES: tuple[Callable[[str], str], ...] = (str, _capitalised, _titled, str.upper)


def _plurals(text: str) -> list[str]:
    """Return regular English plurals of the last word, the usual one first; none if the word ends in no letter."""
    last = text.split()[-1]
    if not last[-1].isalpha():
        return []
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return [text + "es"]
    before_last = last[-2:-1].lower()
    consonant = before_last.isalpha() and before_last not in "aeiou"
    if consonant and last.endswith("y"):
        # The plural of a name keeps its y ("the Kennedys").
        return [text + "s", text[:-1] + "ies"] if last[0].isupper() else [text[:-1] + "ies"]
    if consonant and last.endswith("o"):
        return [text + "s", text + "es"]
    return [text + "s"]


def _refuse_duplicates(anchors: Iterable[str]) -> None:
    for anchor, count in Counter(anchors).items():
        if count > 1:
            raise InputError(f"anchor {anchor!r} is given {count} times; keep one of them")


def _read_json(path: Path) -> list[tuple[str, str]]:
    try:
        pairs = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except InputError:
        raise
    except (ValueError, RecursionError):
        pairs = None  # JSON lines or broken JSON; the reader of records raises the error
    if not isinstance(pairs, _Pairs) or {"anchor", "generic"} <= {name for name, _ in pairs}:
        return _read_records(path)
    for anchor, generic in pairs:
        if not isinstance(generic, str):
            raise InputError(f"{path}: the generic counterpart of {anchor!r} must be text")
    return list(pairs)


def _read_records(path: Path) -> list[tuple[str, str]]:
    return [_pair(record, f"{path}, record {number}") for number, record in enumerate(read_records(path), start=1)]


class _Pairs(list[tuple[str, str]]):
    """A JSON object's entries as they are written, including keys that occur twice."""


def _pair(record: Mapping[str, object], where: str) -> tuple[str, str]:
    anchor, generic = record.get("anchor"), record.get("generic")
    if not isinstance(anchor, str) or not isinstance(generic, str):
        keys = ", ".join(map(str, record)) or "none"
        raise InputError(f'{where}: needs "anchor" and "generic", both text; it has {keys}')
    return anchor, generic
