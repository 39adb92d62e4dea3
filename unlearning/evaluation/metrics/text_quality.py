"""Whether a text is one: repetition, variety, entropy, and a stated rule for gibberish.

A model that has collapsed forgets everything; these say so. All are functions of one text or of its words, which are
what stands between white space (`words`); nothing here needs a model.

The rule (`fault`) has no dictionary and no language: it looks at characters. A text is

1. `empty`: nothing but white space;
2. a `loop`: more than two thirds of its windows of `WINDOW` characters were in it before (in practice, it says the
   same thing four times or more);
3. made of `broken words`: more than half of its words are not well formed (`is_well_formed`), such as `x#9}qK`,
   `wordWORDword`, `???` or undecodable bytes;
4. `unpronounceable`: of its Latin letters, at least `LEAST_LETTERS`, fewer than `LEAST_VOWELS` are vowels.

The last three are gibberish. What the rule cannot see: real words in random order, fluent nonsense, well-formed words
of no language, and random letters where they are few or happen to have vowels: entropy and perplexity under a sound
model see some of that. It is made for prose: source code, formulas and tables of symbols may count as gibberish.
"""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

WINDOW = 10
"""Characters of the windows of which a loop's are repeated."""

MOST_REPEATED = 2 / 3
MOST_BROKEN = 0.5
LONGEST_WORD = 40
LEAST_LETTERS = 40
LEAST_VOWELS = 0.28
"""About 40 % of the letters of European languages are vowels (y among them), 23 % of random letters."""

Fault = Literal["empty", "loop", "broken words", "unpronounceable"]

_JOINS = frozenset("'-./,:;&@_+")
"""What ASCII may join the pieces of a word by: don't, well-known, 3.14, 12:30, and/or, AT&T."""

_VOWELS = frozenset("aeiouyæœøı")
_UNSPACED = frozenset(
    "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA IDEOGRAPHIC BOPOMOFO THAI LAO KHMER MYANMAR TIBETAN".split()
)
"""Scripts that leave no space between words, and those that Japanese mixes, as letters' names begin."""


def words(text: str) -> list[str]:
    """Return the words of a text, which are separated by white space."""
    return text.split()


def ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return all runs of n units, from left to right."""
    return [tuple(units[first : first + n]) for first in range(len(units) - n + 1)]


def repetition(units: Sequence[Hashable], n: int) -> float | None:
    """Return the share of n-grams that occur earlier in the text ("rep-n", 1 - distinct / all; 2202.06417).

    Args:
        units: Words or characters of the text.
        n: Length of the n-grams.

    Returns:
        0 if all n-grams differ, towards 1 in a loop; None if there is no n-gram.
    """
    found = ngrams(units, n)
    return 1 - len(set(found)) / len(found) if found else None


def longest_run(units: Sequence[Hashable]) -> int:
    """Return the length of the longest run of one unit; 0 for no units."""
    return max((sum(1 for _ in run) for _, run in groupby(units)), default=0)


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Return the distinct n-grams of all texts over all of their n-grams (Li et al. 2016, 1510.03055).

    The value falls if texts resemble each other, and with the total length of the texts: compare like with like.

    Args:
        texts: Units of each text.
        n: Length of the n-grams.

    Returns:
        A share, 0 to 1; None if there is no n-gram.
    """
    found = [gram for units in texts for gram in ngrams(units, n)]
    return len(set(found)) / len(found) if found else None


def token_entropy(units: Sequence[Hashable], n: int = 1) -> float | None:
    """Return the Shannon entropy of the text's own n-grams, in bits.

    Args:
        units: Words of the text.
        n: Length of the n-grams.

    Returns:
        0 if all n-grams are the same, log2(number of n-grams) if all differ; None if there is no n-gram.
    """
    counts = np.array(list(Counter(ngrams(units, n)).values()), dtype=np.float64)
    if not counts.size:
        return None
    shares = counts / counts.sum()
    return float(abs(-(shares * np.log2(shares)).sum()))  # never -0.0


def fault(text: str) -> Fault | None:
    """Return the fault of a text by the rule of this module; None if the rule finds none."""
    if not text.strip():
        return "empty"
    repeated = repetition(" ".join(words(text)), WINDOW)
    if repeated is not None and repeated > MOST_REPEATED:
        return "loop"
    split = words(text)
    if sum(not is_well_formed(word) for word in split) > MOST_BROKEN * len(split):
        return "broken words"
    latin = [letter for letter in unicodedata.normalize("NFKD", text.lower()) if _script(letter) == "LATIN"]
    if len(latin) >= LEAST_LETTERS and sum(letter in _VOWELS for letter in latin) < LEAST_VOWELS * len(latin):
        return "unpronounceable"
    return None


def is_gibberish(text: str) -> bool:
    """Return whether the text is gibberish by the rule of this module; an empty text is `empty`, not gibberish."""
    return fault(text) not in (None, "empty")


def is_well_formed(word: str) -> bool:
    """Return whether a word looks like a word, in any script.

    After removal of surrounding signs (quotes, brackets, full stops), the word is not empty and has at most
    `LONGEST_WORD` characters, and each of its pieces between hyphens, apostrophes and the like holds letters of one
    script with at most one change from small to capital (McAvoy), or digits with at most three letters after them
    (19th, 1990s). Words in scripts without spaces may have any length, and digits anywhere.

    Args:
        word: The word.

    Returns:
        Whether the word is well formed.
    """
    bare = _bare(word)
    pieces = "".join(" " if _joins(sign) else sign for sign in bare).split()
    if any(_script(sign) in _UNSPACED for sign in bare):
        return all(_is_letter(sign) or sign.isdecimal() for piece in pieces for sign in piece)
    return 0 < len(bare) <= LONGEST_WORD and all(map(_is_piece, pieces))


def _bare(word: str) -> str:
    """Return a word without the punctuation, currency and other signs around it."""
    first, last = 0, len(word)
    while first < last and _surrounds(word[first]):
        first += 1
    while first < last and _surrounds(word[last - 1]):
        last -= 1
    return word[first:last]


def _surrounds(sign: str) -> bool:
    return sign != "\ufffd" and unicodedata.category(sign)[0] in "PS"


def _joins(sign: str) -> bool:
    return sign in _JOINS if sign.isascii() else unicodedata.category(sign)[0] == "P"


def _is_piece(piece: str) -> bool:
    letters = piece[next((place for place, sign in enumerate(piece) if not sign.isdecimal()), len(piece)) :]
    if not all(map(_is_letter, letters)) or (len(letters) < len(piece) and len(letters) > 3):
        return False
    rises = sum(left.islower() and right.isupper() for left, right in pairwise(letters))
    return rises <= 1 and len({_script(sign) for sign in letters} - {""}) <= 1


def _is_letter(sign: str) -> bool:
    """Return whether a sign is a letter, or a mark on a letter (an accent, a vowel sign)."""
    return unicodedata.category(sign)[0] in "LM"


def _script(sign: str) -> str:
    """Return the script of a letter, as its Unicode name begins; an empty text for other signs."""
    return unicodedata.name(sign, "").split(" ")[0] if unicodedata.category(sign)[0] == "L" else ""


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, n: int) -> str:
    """Return a text's first n tokens as text; a shorter text is returned unchanged.

    MUSE cuts the reference continuations in this way. The special tokens that the tokenizer adds count among the n.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        n: Number of tokens.

    Returns:
        The beginning of the text.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    return text if len(ids) <= n else str(tokenizer.decode(ids[:n], skip_special_tokens=True))
