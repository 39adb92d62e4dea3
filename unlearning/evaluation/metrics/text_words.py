"""Words of a text in any script, as the metrics of generated texts count them.

Texts are normalised (NFC) first, so that one letter written in two ways (é, or e with an accent put on it) is one.
Scripts that leave no space between words, such as Chinese, Japanese and Thai, have one word per character.
"""

import re
import unicodedata

import regex

_SCRIPTS = "Han Hira Kana Bopo Yiii Thai Laoo Khmr Mymr Tibt Java Bali Tale Talu Lana Tavt".split()
_UNSPACED = "[[" + "".join(rf"\p{{scx={script}}}" for script in _SCRIPTS) + r"]&&[\p{L}\p{Nl}]]"
"""A letter of a script without spaces; Japanese mixes three of them with signs that several scripts share."""

_CHARACTER = rf"{_UNSPACED}\p{{M}}*"
_WORD = regex.compile(
    rf"{_CHARACTER}|[[\p{{L}}\p{{Nd}}\p{{Nl}}]--{_UNSPACED}][[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]--{_UNSPACED}]*",
    regex.VERSION1,
)
_PIECE = regex.compile(rf"{_CHARACTER}|[^{_UNSPACED}]+", regex.VERSION1)
_SPACED = rf"[\w--{_UNSPACED}--\p{{M}}]"
_NO_BEGINNING = regex.compile(rf"(?!{_UNSPACED})(?<={_SPACED}\p{{M}}*)", regex.VERSION1)
_NO_END = regex.compile(rf"(?=\p{{M}})|(?<!{_CHARACTER})(?={_SPACED})", regex.VERSION1)
"""Match places where no phrase begins or ends: beside a word. A character of a script without spaces is a word,
whatever stands beside it; a mark belongs to what is before it."""

_UNSEEN = regex.compile(r"[\u200c\u200d\p{Variation_Selector}]")
"""What joins or shapes letters and is none: with or without it, the word is the same."""


def normalised(text: str) -> str:
    """Return the text in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text)


def spoken_words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and the marks on them.

    For English these are the words of `rouge-score`. A vowel sign or an accent belongs to its letter in every script.

    Args:
        text: The text.

    Returns:
        The words in their order; no word for a text of signs only, such as "?!".

    Examples:
        >>> spoken_words("The café, 1990!")
        ['the', 'café', '1990']
        >>> spoken_words("安娜 Lind")
        ['安', '娜', 'lind']
        >>> spoken_words("दिन") == spoken_words("दीन")
        False
    """
    return list(_WORD.findall(normalised(_UNSEEN.sub("", text).lower())))


def spaced_words(text: str) -> list[str]:
    """Return what stands between white space, signs included; characters of scripts without spaces are words each.

    Args:
        text: The text.

    Returns:
        The words in their order, in their own case.

    Examples:
        >>> spaced_words("The café, 1990!")
        ['The', 'café,', '1990!']
        >>> spaced_words("安娜!")
        ['安', '娜', '!']
    """
    return [piece for part in normalised(text).split() for piece in _PIECE.findall(part)]


def has_words(text: str, phrase: str, *, any_case: bool) -> bool:
    """Return whether a text has a phrase as whole words, with any white space between its words.

    Args:
        text: The text.
        phrase: The phrase.
        any_case: Ignore case.

    Returns:
        True if it does; False for a phrase of white space only.

    Examples:
        >>> has_words("Mira went to  Oslo.", "to Oslo", any_case=False), has_words("Oslobukta", "Oslo", any_case=False)
        (True, False)
        >>> has_words("安娜出生在奥斯陆。", "奥斯陆", any_case=False)
        True
    """
    text, words = normalised(text), normalised(phrase).split()
    if not words:
        return False
    pattern = r"\s+".join(map(re.escape, words))
    found = re.finditer(rf"(?=({pattern}))", text, re.IGNORECASE if any_case else 0)  # also those that overlap
    ends = (match.span(1) for match in found)
    return any(not _NO_BEGINNING.match(text, first) and not _NO_END.match(text, last) for first, last in ends)
