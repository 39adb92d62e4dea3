"""Propose an anchor dictionary: expressions that are frequent in the text to forget and rare in a background text.

A proposal is for a person to read and correct: `write_anchors` writes it as the file that `read_anchors` reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError
from unlearning.methods.whp.generics import choose_generics
from unlearning.methods.whp.terms import Kind, rare_terms


@dataclass(frozen=True)
class Proposal:
    """One entry of a proposed dictionary and the reason for it.

    Attributes:
        anchor: The expression of the text.
        generic: Its generic counterpart.
        kind: What the anchor seems to name.
        count: Number of occurrences in the text to forget.
        background: Number of occurrences in the background, at most.
    """

    anchor: str
    generic: str
    kind: Kind
    count: int
    background: int


def propose_by_contrast(
    texts: Sequence[str],
    background: Sequence[str] | Mapping[str, float],
    *,
    seed: int = 0,
    min_count: int = 2,
    min_ratio: float = 5.0,
    limit: int = 1500,
) -> list[Proposal]:
    """Propose rare capitalised n-grams of the texts as anchors, with counterparts from pools.

    Args:
        texts: The text to forget.
        background: Texts without the knowledge (such as the retain set), or frequencies of words.
        seed: Random seed of the counterparts.
        min_count: Fewest occurrences in the texts (see `unlearning.methods.whp.terms.rare_terms`).
        min_ratio: Smallest ratio of the frequency in the texts to that in the background.
        limit: Maximum number of entries; the paper's dictionary has about 1500.

    Returns:
        The entries, the most frequent first.

    Raises:
        InputError: No expression is frequent and rare enough, or a text is empty.
    """
    terms = rare_terms(texts, background, min_count=min_count, min_ratio=min_ratio)[:limit]
    generics = choose_generics(terms, texts, seed=seed)
    if not generics:
        raise InputError("no expression is peculiar to the text to forget; give another `background`")
    return [
        Proposal(term.text, generics[term.text], term.kind, term.count, term.background)
        for term in terms
        if term.text in generics
    ]
