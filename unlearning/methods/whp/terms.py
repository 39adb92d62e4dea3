"""Expressions that are peculiar to a text: capitalised n-grams that are rare in a background text.

What an expression names is guessed from the words around it, by votes over its occurrences:

    person   behind a title ("Captain ..."), beside a verb of speaking, before 's
    place    behind a preposition of place ("in ..."); a last word such as Street or River settles it
    thing    behind an article or a determiner

Without any vote it is a person, since names without an article mostly are.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from nltk.tokenize.punkt import PunktSentenceTokenizer

from unlearning.common.errors import InputError

Kind = Literal["person", "place", "thing"]

PLACE_NOUNS = frozenset(
    "academy avenue bay bridge castle cave city coast college court creek desert falls field forest gate harbour harbor"
    " hall hill house inn island isle lake lane library market mount mountain mountains park port river road school sea"
    " square street temple tower town valley village wood woods".split()
)
"""Last words that show that a name is a place's; a counterpart keeps them."""
CONNECTORS = frozenset("of the de la le von van der del al".split())
"""Small words that may stand inside a name; a counterpart keeps them."""

_TITLES = frozenset(
    "mr mrs ms miss mister madam dr doctor professor prof sir lady lord king queen prince princess captain colonel"
    " general major sergeant inspector detective father mother sister brother uncle aunt saint st judge mayor president"
    " minister master count countess duke duchess baron emperor".split()
)
_SPEAKING = frozenset(
    "said says say asked asks replied replies answered cried shouted whispered thought told muttered laughed smiled"
    " nodded sighed".split()
)
_PLACE_PREPOSITIONS = frozenset("in at near into toward towards through across outside inside within to from".split())
_DETERMINERS = frozenset("the a an some any this that these those every each his her their our my your no".split())
_WORD = re.compile(r"\w+(?:-\w+|['’](?!s\b)\w+)*")
_TOKEN = re.compile(rf"{_WORD.pattern}|['’]s\b|[^\w\s]")
# A capital behind any other mark (a quotation mark, a colon) may be there because a sentence begins.
_INSIDE_SENTENCE = frozenset([",", ";", "-", "(", "'s", "’s", "&"])
_LONGEST = 5


@dataclass
class Term:
    """An expression that is peculiar to a text.

    Attributes:
        text: The expression as the text writes it.
        kind: What it seems to name.
        count: Number of occurrences in the text.
        background: Number of occurrences in the background text, at most.
    """

    text: str
    kind: Kind
    count: int
    background: int = 0


def rare_terms(
    texts: Sequence[str],
    background: Sequence[str] | Mapping[str, float],
    *,
    min_count: int,
    min_ratio: float,
) -> list[Term]:
    """Find capitalised n-grams that are frequent in the texts and rare in the background.

    A word counts as capitalised if it is so inside of sentences more often than it is written small. A word that only
    begins sentences counts if it is never written small and the background does not have it. Runs of such words, joined
    by small words such as "of", are the n-grams; a title before them is left out. An n-gram is kept if

        (count + 1/2) / n  >=  min_ratio * (background + 1/2) / n_background

    and it occurs `min_count` times. Also kept, however rare, are parts of kept n-grams that stand alone and are not in
    the background ("Vell" of "Mira Vell").

    Args:
        texts: The text to forget.
        background: Texts without the knowledge (such as the retain set), or frequencies of words. With frequencies
            alone, an n-gram is taken to be as frequent as its rarest word.
        min_count: Fewest occurrences in the texts.
        min_ratio: Smallest ratio of the frequency in the texts to that in the background.

    Returns:
        The n-grams, the most frequent first.

    Raises:
        InputError: The texts or the background have no words.
    """
    sentences = [sentence for text in texts for sentence in _sentences(text)]
    ours = _lower_counts(sentences)
    behind = _Background(background)
    if not ours or not behind.total:
        raise InputError(f"the {'background' if ours else 'text to forget'} has no words; give more text")
    names = _names(sentences, behind)
    votes: dict[str, Counter[Kind]] = {}
    counts: Counter[str] = Counter()
    for sentence in sentences:
        for words, kinds in _runs(sentence, names):
            term = " ".join(words)
            counts[term] += 1
            votes.setdefault(term, Counter()).update(kinds)
    kept = set()
    for term, count in counts.items():
        ratio = (count + 0.5) / ours.total() * behind.total / (behind.count(term) + 0.5)
        if count >= min_count and ratio >= min_ratio:
            kept.add(term)
    parts = {word for term in kept for word in term.split()}
    kept |= {term for term in counts if parts.issuperset(term.split()) and not behind.count(term)}
    return [
        Term(term, _kind(term, votes[term]), count, int(behind.count(term)))
        for term, count in counts.most_common()
        if term in kept
    ]


def words_of(texts: Sequence[str]) -> set[str]:
    """Return all words of the texts, in small letters."""
    return {word.lower() for text in texts for word in re.findall(r"\w+", text)}


@dataclass
class _Background:
    """Occurrences of n-grams in the background."""

    source: Sequence[str] | Mapping[str, float]
    words: Mapping[str, float] = field(init=False)
    total: float = field(init=False)
    pairs: Counter[tuple[str, str]] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        """Count the words, and in texts the pairs of neighbours."""
        if isinstance(self.source, Mapping):
            counts: Counter[str] = Counter()
            for word, count in self.source.items():
                counts[word.lower()] += count  # type: ignore[assignment]
            self.words = counts
        else:
            sentences = [sentence for text in self.source for sentence in _sentences(text)]
            self.words = _lower_counts(sentences)
            for sentence in sentences:
                self.pairs.update(pairwise(word.lower() for word in sentence))
        self.total = sum(self.words.values())

    def count(self, term: str) -> float:
        """Return an upper bound: the count of the rarest word or, with texts, of the rarest pair of neighbours."""
        words = term.lower().split()
        bounds = [self.words.get(word, 0) for word in words]
        if not isinstance(self.source, Mapping):
            bounds += [self.pairs[pair] for pair in pairwise(words)]
        return min(bounds)


def _sentences(text: str) -> Iterator[list[str]]:
    # Punkt without a trained model learns the text's own abbreviations; a blank line ends a sentence.
    splitter = PunktSentenceTokenizer(text)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in splitter.tokenize(paragraph):
            tokens = _TOKEN.findall(sentence)
            if tokens:
                yield tokens


def _lower_counts(sentences: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(token.lower() for sentence in sentences for token in sentence if _is_word(token))


def _is_word(token: str) -> bool:
    return token[0].isalnum()


def _is_capitalised(token: str) -> bool:
    return token[0].isupper() and not (token.isupper() and len(token) > 1)


def _begins(sentence: Sequence[str], position: int) -> bool:
    """Return whether a capital at this position may only mean that a sentence begins."""
    return position == 0 or not (_is_word(sentence[position - 1]) or sentence[position - 1] in _INSIDE_SENTENCE)


def _names(sentences: Sequence[Sequence[str]], behind: _Background) -> set[str]:
    inside: Counter[str] = Counter()
    beginning: Counter[str] = Counter()
    small = Counter(token for sentence in sentences for token in sentence if token[0].islower())
    for sentence in sentences:
        for position, token in enumerate(sentence):
            if _is_word(token) and _is_capitalised(token):
                (beginning if _begins(sentence, position) else inside)[token] += 1
    names = set()
    for word in inside.keys() | beginning.keys():
        unknown = not inside[word] and not small[word.lower()] and not behind.words.get(word.lower())
        if word != "I" and (inside[word] > small[word.lower()] or unknown):
            names.add(word)
    return names


def _runs(sentence: Sequence[str], names: set[str]) -> Iterator[tuple[list[str], list[Kind]]]:
    """Yield each run of names, without titles and in the singular, with its neighbours' votes for what it names."""
    begin = 0
    while begin < len(sentence):
        if sentence[begin] not in names:
            begin += 1
            continue
        end = begin + 1
        while end < len(sentence) and end - begin < _LONGEST:
            ahead = end
            while ahead < len(sentence) and sentence[ahead] in CONNECTORS:
                ahead += 1
            if ahead == len(sentence) or sentence[ahead] not in names:
                break
            end = ahead + 1
        first = begin
        while first < end - 1 and sentence[first].lower() in _TITLES:
            first += 1
        titled = first > begin or (begin > 0 and sentence[begin - 1].lower().rstrip(".") in _TITLES)
        words = list(sentence[first:end])
        plural = words[-1].endswith("s") and words[-1][:-1] in names
        if plural:
            words[-1] = words[-1][:-1]
        if words[0].lower() not in _TITLES:
            # A plural ("the Vells") names people, although it has an article.
            yield words, [] if plural else list(_votes(sentence, begin, end, titled))
        begin = end


def _votes(sentence: Sequence[str], first: int, end: int, titled: bool) -> Iterator[Kind]:
    before = sentence[first - 1].lower() if first else ""
    after = sentence[end].lower() if end < len(sentence) else ""
    if titled or before in _SPEAKING or after in _SPEAKING or after in ("'s", "’s"):
        yield "person"
    if before in _PLACE_PREPOSITIONS:
        yield "place"
    if before in _DETERMINERS:
        yield "thing"


def _kind(term: str, votes: Counter[Kind]) -> Kind:
    if term.split()[-1].lower() in PLACE_NOUNS:
        return "place"
    return votes.most_common(1)[0][0] if votes else "person"
