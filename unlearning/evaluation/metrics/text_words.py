"""Words of a text in any script, as the metrics of generated texts count them.

Texts are normalised (NFC) first, so that one letter written in two ways (é, or e with an accent put on it) is one.
Scripts that leave no space between words, such as Chinese, Japanese and Thai, have one word per character.
"""

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
