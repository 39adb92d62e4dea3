"""Generic counterparts of terms, from pools by kind; one word replaces one word, so that names stay consistent."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from unlearning.common.errors import InputError
from unlearning.methods.whp.terms import CONNECTORS, PLACE_NOUNS, Kind, Term, words_of

_GIVEN = """Anna Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Martha Nathan Olive Paul Rachel Simon
Teresa Victor Wendy Alan Beth Carl Diana Edward Fiona George Helen Ian Julia Kevin Laura Mark Nora Oscar Paula Robert
Sarah Thomas Ursula Walter Alice Brian Carol Daniel Ellen Felix Gloria Harold Isabel James Kate Louis Mary Neil
Patrick Rose Stephen Tina Vincent Abigail Andrew Bridget Charles Dorothy Eric Frances Gordon Hannah Isaac Joan Keith
Linda Max Nancy Oliver Peter Ruth Samuel Amy Arthur Audrey Eleanor Ernest""".split()
_FAMILY = """Foster Harris Cooper Bennett Parker Ellis Morgan Turner Hughes Ward Palmer Adams Barnes Collins Dixon
Edwards Fisher Gibson Howard Ingram Jenkins Knight Lawson Mason Newman Osborne Payne Quinn Reed Saunders Tucker
Underwood Vaughan Walsh Yates Abbott Baxter Carter Dawson Elliott Fletcher Graham Hudson Irwin Jennings Kemp Lambert
Miller Norris Owen Pearson Rogers Sharp Taylor Upton Weaver Young Archer Bishop Chapman Doyle Evans Franklin Griffin
Hunter Jackson Kennedy Lloyd Murphy Nelson Parsons Richards Shepherd Thornton Allen Andrews Atkins Asher""".split()
_PLACES = [
    first + last
    for first, last in product(
        "Ash Oak Elm River Spring Stone Mill Green Bridge West East North Wood Lake Clear Fair Iron".split(),
        "ford field ton ville dale bury brook mouth wick stead".split(),
    )
]
_THINGS = """Meridian Beacon Compass Lantern Anchor Summit Harvest Cedar Copper Amber Pioneer Horizon Crescent Falcon
Granite Juniper Keystone Legacy Maple Nimbus Orchard Pinnacle Quarry Ridge Sterling Trident Union Vista Willow Zephyr
Atlas Barley Canvas Delta Ember Fable Garnet Hazel Indigo Jasper Kestrel Laurel Magnet Needle Onyx Pebble Quartz
Ribbon Saffron Timber Umber Velvet Walnut Yarrow Acorn Button Candle Ivory Easel Octave""".split()
POOLS: Mapping[str, Sequence[str]] = {"given": _GIVEN, "family": _FAMILY, "place": _PLACES, "thing": _THINGS}
"""Words that counterparts are made of; no word is in two pools."""


def choose_generics(terms: Sequence[Term], texts: Sequence[str], *, seed: int) -> dict[str, str]:
    """Choose a counterpart for each term; a word has the same one in every term.

    Words that name the kind of place ("Street") and small words ("of") are kept, so a term of such words alone has no
    counterpart and is left out. Pools are shuffled by the seed, and lack the words that the texts use. A counterpart
    begins with a vowel if its word does, for the sake of "a" and "an", as long as the pool has such words.

    Args:
        terms: The terms.
        texts: The text to forget.
        seed: Random seed.

    Returns:
        Counterparts by term, in the order of the terms.

    Raises:
        InputError: The pools have too few words.
    """
    taken = words_of(texts)
    pools = {name: _Pool(words, taken, f"{seed} {name}") for name, words in POOLS.items()}
    family = {term.text.split()[-1] for term in terms if term.kind == "person" and " " in term.text}
    known: dict[str, str] = {}
    generics = {}
    # Longer terms first: the first names of full names are known before they stand alone.
    for term in sorted(terms, key=lambda term: (-term.text.count(" "), -term.count, term.text)):
        words = term.text.split()
        changed = False
        chosen = []
        for word in words:
            small = word.lower()
            if small in CONNECTORS or small in PLACE_NOUNS:
                chosen.append(word)
                continue
            if small not in known:
                known[small] = pools[_pool_name(term.kind, word, family)].draw(vowel=small[0] in "aeiou")
            chosen.append(known[small])
            changed = True
        if changed:
            generics[term.text] = " ".join(chosen)
    return {term.text: generics[term.text] for term in terms if term.text in generics}


def _pool_name(kind: Kind, word: str, family: set[str]) -> str:
    if kind != "person":
        return kind
    return "family" if word in family else "given"


class _Pool:
    """Words in an order given by the seed, then pairs of them joined by a hyphen."""

    def __init__(self, words: Sequence[str], taken: set[str], seed: str) -> None:
        """Shuffle the words that are not taken."""
        free = [word for word in dict.fromkeys(words) if not {word.lower(), f"{word.lower()}s"} & taken]
        random.Random(seed).shuffle(free)
        self.vowels = _with_pairs([word for word in free if word[0] in "AEIOU"])
        self.others = _with_pairs([word for word in free if word[0] not in "AEIOU"])

    def draw(self, *, vowel: bool) -> str:
        for words in (self.vowels, self.others) if vowel else (self.others, self.vowels):
            word = next(words, None)
            if word is not None:
                return word
        raise InputError("there are more terms than generic names; lower `limit`, or raise `min_count`")


def _with_pairs(words: Sequence[str]) -> Iterator[str]:
    yield from words
    yield from (f"{first}-{last}" for first, last in product(words, repeat=2) if first != last)
