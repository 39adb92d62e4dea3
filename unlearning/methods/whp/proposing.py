"""Anchor dictionaries that nobody has written yet: proposed by rule, or by a function that reads passages.

A proposal is for a person to read and correct: `write_anchors` writes it as the file that `read_anchors` reads.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.generics import choose_generics
from unlearning.methods.whp.terms import Kind, Term, entity_terms, rare_terms, words_of

Proposer = Callable[[str], Mapping[str, str]]
"""Reads a passage and proposes anchors with their generic counterparts: a language model behind a prompt, say."""


@dataclass(frozen=True)
class Proposal:
    """One entry of a proposed dictionary and why it is there.

    Attributes:
        anchor, generic: the entry.
        kind: what the anchor seems to name.
        count: how often it occurs in the text to forget.
        background: how often in the background.
    """

    anchor: str
    generic: str
    kind: Kind
    count: int
    background: int


@dataclass(frozen=True)
class MergedProposals:
    """What a proposer said of many passages.

    Attributes:
        generics: the dictionary.
        dropped: anchors that were proposed and are not in it, with the reason.
    """

    generics: dict[str, str]
    dropped: dict[str, str]


def propose_by_contrast(
    texts: Sequence[str],
    background: Sequence[str] | Mapping[str, float],
    *,
    seed: int = 0,
    min_count: int = 2,
    min_ratio: float = 5.0,
    limit: int = 1500,
) -> list[Proposal]:
    """Rare capitalised n-grams of the texts (`unlearning.methods.whp.terms.rare_terms`), with counterparts from pools.

    Args:
        texts: the text to forget.
        background: texts that do not tell of it (the retain set), or frequencies of words.
        seed: of the counterparts.
        min_count, min_ratio: see `rare_terms`.
        limit: most entries; the paper's dictionary has about 1500.

    Raises:
        InputError: there is nothing to propose, or no text.
    """
    terms = rare_terms(texts, background, min_count=min_count, min_ratio=min_ratio)
    return _proposals(terms[:limit], texts, seed, "lower min_count or min_ratio, or give another background")


def propose_by_entities(
    texts: Sequence[str], *, model: str = "en_core_web_sm", seed: int = 0, min_count: int = 1, limit: int = 1500
) -> list[Proposal]:
    """Named entities by a spacy model, with counterparts from pools.

    Raises:
        InputError: spacy or its model is not installed (says the command), or it finds nothing.
    """
    terms = entity_terms(texts, model=model, min_count=min_count)
    return _proposals(terms[:limit], texts, seed, "lower min_count, or use another model")


def merge_proposals(
    proposer: Proposer, texts: Sequence[str], *, passages: int = 200, words: int = 300, seed: int = 0
) -> MergedProposals:
    """Ask a proposer about random passages and merge its answers, as the paper does with a language model.

    A passage is `words` words long and begins anywhere. Where answers differ, the most frequent counterpart stands, and
    of equally frequent ones the first. Left out are anchors that no text has, those that are their own counterpart, and
    those whose counterpart the texts use or which holds an anchor.

    Args:
        proposer: from a passage to anchors and counterparts.
        texts: the text to forget.
        passages: how many; where they would cover the texts several times over, still as many.
        words: length of a passage.
        seed: of the passages.

    Raises:
        InputError: no text, or no proposal survives.
    """
    split = [text.split() for text in texts if text.strip()]
    if not split:
        raise InputError("the texts are empty; give the text to forget")
    drawn = random.Random(seed)
    votes: dict[str, Counter[str]] = {}
    for text in drawn.choices(split, weights=[len(text) for text in split], k=passages):
        start = drawn.randrange(max(1, len(text) - words + 1))
        for anchor, generic in proposer(" ".join(text[start : start + words])).items():
            votes.setdefault(" ".join(anchor.split()), Counter())[" ".join(generic.split())] += 1
    merged = _keep_usable({anchor: counts.most_common(1)[0][0] for anchor, counts in votes.items()}, texts)
    if not merged.generics:
        first = next(iter(merged.dropped.items()), ("", "it proposed nothing"))
        raise InputError(f"the proposer gave no usable anchor ({first[0]!r}: {first[1]}); look at what it answers")
    return merged


def _keep_usable(proposed: Mapping[str, str], texts: Sequence[str]) -> MergedProposals:
    vocabulary = words_of(texts)
    dropped: dict[str, str] = {}
    usable: dict[str, str] = {}
    for anchor, generic in proposed.items():
        try:
            single = Anchors({anchor: generic})
        except InputError as error:
            dropped[anchor] = str(error)
            continue
        if not any(single.find(text) for text in texts):
            dropped[anchor] = "does not occur in the texts"
        elif words_of([generic]) <= vocabulary:
            dropped[anchor] = f"the texts use the words of its counterpart {generic!r}"
        else:
            usable[anchor] = generic
    # Counterparts that hold an anchor: all are looked at before any is left out, so the order does not matter.
    everything = Anchors({anchor: _UNUSED for anchor in usable}) if usable else None
    for anchor, generic in list(usable.items()):
        inside = everything.find(generic) if everything else []
        if inside:
            dropped[anchor] = f"its counterpart {generic!r} holds the anchor {inside[0].anchor!r}"
            del usable[anchor]
    return MergedProposals(usable, dropped)


# A counterpart in which no anchor occurs: no word.
_UNUSED = "."


def _proposals(terms: Sequence[Term], texts: Sequence[str], seed: int, advice: str) -> list[Proposal]:
    generics = choose_generics(terms, texts, seed=seed)
    if not generics:
        raise InputError(f"no expression is peculiar to the text; {advice}")
    return [
        Proposal(term.text, generics[term.text], term.kind, term.count, term.background)
        for term in terms
        if term.text in generics
    ]
