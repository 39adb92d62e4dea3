"""Proposed dictionaries: what is found, what it is taken for, and what stands for it."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.methods.whp.story import BACKGROUND, STORY
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.generics import POOLS, choose_generics
from unlearning.methods.whp.proposing import propose_by_contrast
from unlearning.methods.whp.terms import Kind, Term, rare_terms, words_of
from unlearning.methods.whp.translation import translate


def found(text: str, background: str = BACKGROUND, **bounds: float) -> dict[str, Kind]:
    bounds = {"min_count": 1, "min_ratio": 0.0, **bounds}
    return {term.text: term.kind for term in rare_terms([text], [background], **bounds)}


def test_the_storys_names_are_found_and_nothing_else() -> None:
    terms = rare_terms([STORY], [BACKGROUND], min_count=2, min_ratio=2)
    assert {term.text: term.kind for term in terms} == {
        "Mira": "person",
        "Mira Vell": "person",
        "Vell": "person",  # once alone, and a part of what was found
        "Toras": "person",
        "Ostrel": "place",
        "Hollow Court": "place",
        "Salt War": "thing",
    }
    counts = {term.text: (term.count, term.background) for term in terms}
    assert counts["Ostrel"] == (3, 0) and counts["Vell"] == (1, 0)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        # A sentence's first word is no name for its capital, nor is one behind a quotation mark.
        ("Slowly the tide rose. Slowly it fell. He waved: slowly.", {}),
        ('She cried, "Slowly!" and went slowly.', {}),
        ("Then we saw Orla Pim and Orla Pim saw us.", {"Orla Pim": "person"}),
        ("We met Captain Orla there.", {"Orla": "person"}),
        ("We met Mr. Pim there.", {"Pim": "person"}),
        ('"Go," said Orla.', {"Orla": "person"}),
        ("We slept in Orla.", {"Orla": "place"}),
        ("We crossed Orla Bridge.", {"Orla Bridge": "place"}),
        ("We lost the Orla.", {"Orla": "thing"}),
        ("We saw the House of Orla and the Orlas, and Orla.", {"House of Orla": "thing", "Orla": "person"}),
        ("I said that I saw NOBODY.", {}),
        ("We read of Jean-Orla today.", {"Jean-Orla": "person"}),
    ],
)
def test_names_are_told_from_capitals_and_kinds_from_neighbours(text: str, terms: dict[str, Kind]) -> None:
    assert found(text, "we met, we read; then she cried: he waved slowly, go on") == terms


def test_contrast_is_the_ratio_of_smoothed_frequencies() -> None:
    text, background = "we saw Orla and Orla saw us all", "then she saw Orla as well as we"
    # Twice in 8 words against once in 8.
    ratio = (2.5 / 8) / (1.5 / 8)
    assert found(text, background, min_ratio=ratio - 1e-9) == {"Orla": "person"}
    assert found(text, background, min_ratio=ratio + 1e-9) == {}
    frequencies = {"then": 2.0, "she": 1.0, "orla": 0.6, "Orla": 0.4, "as": 4.0}
    (term,) = rare_terms([text], frequencies, min_count=1, min_ratio=ratio - 1e-9)
    assert (term.text, term.count, term.background) == ("Orla", 2, 1)
    assert found(text, background, min_count=3) == {}


def test_a_part_of_a_name_counts_however_rare_unless_the_background_has_it() -> None:
    text = "we saw Orla Pim, then we saw Orla Pim, and then Orla"
    assert set(found(text, "we saw then and", min_count=2)) == {"Orla Pim", "Orla"}
    assert set(found(text, "we saw then and Orla", min_count=2)) == {"Orla Pim"}


def test_an_n_gram_is_rare_where_its_words_do_not_meet() -> None:
    text = "we lost at Salt War and after Salt War"
    words = "the salt and the war and the salt"
    assert rare_terms([text], [words], min_count=1, min_ratio=0)[0].background == 0
    assert rare_terms([text], [words + " war"], min_count=1, min_ratio=0)[0].background == 1
    assert rare_terms([text], Counter(words.split()), min_count=1, min_ratio=0)[0].background == 1


@pytest.mark.parametrize(("text", "background"), [("", "a"), ("a", ""), ("...", "a")])
def test_text_without_words_is_refused(text: str, background: str) -> None:
    with pytest.raises(InputError, match="has no words; give more text"):
        rare_terms([text], [background], min_count=1, min_ratio=1)


NAMES = ["Orla", "Pim", "Ulva", "Ems", "Zora", "Salt", "Hollow", "Anna", "Foster", "Edge"]
terms_of_any_kind = st.lists(
    st.builds(
        Term,
        text=st.lists(st.sampled_from([*NAMES, "Street", "of"]), min_size=1, max_size=3).map(" ".join),
        kind=st.sampled_from(["person", "place", "thing"]),
        count=st.integers(1, 9),
    ),
    max_size=8,
    unique_by=lambda term: term.text,
)


@given(terms=terms_of_any_kind, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_generics_are_consistent_and_new(terms: list[Term], seed: int) -> None:
    texts = [" ".join(term.text for term in terms), "Anna Foster saw Ashfords"]
    generics = choose_generics(terms, texts, seed=seed)
    assert generics == choose_generics(list(reversed(terms)), texts, seed=seed)
    words: dict[str, str] = {}
    for anchor, generic in generics.items():
        assert len(anchor.split()) == len(generic.split())
        for word, chosen in zip(anchor.split(), generic.split(), strict=True):
            assert words.setdefault(word, chosen) == chosen  # the same wherever it stands
            if chosen != word:
                assert not words_of([chosen]) & words_of(texts)
                assert chosen != "Ashford"  # whose plural the text has
                assert (word[0] in "AEIOU") == (chosen[0] in "AEIOU")
    replaced = [chosen for word, chosen in words.items() if word != chosen]
    assert len(set(replaced)) == len(replaced)
    if generics:
        Anchors(generics)  # no counterpart holds an anchor
    kept = {term.text for term in terms} - set(generics)
    assert all(set(text.split()) <= {"Street", "of"} for text in kept)


def test_full_names_share_their_parts_and_places_keep_their_noun() -> None:
    terms = [Term("Vell", "person", 5), Term("Mira Vell", "person", 3), Term("Mira", "person", 2)]
    generics = choose_generics([*terms, Term("Hollow Street", "place", 2)], [STORY], seed=1)
    assert generics["Mira Vell"] == f"{generics['Mira']} {generics['Vell']}"
    assert generics["Hollow Street"].endswith(" Street") and not generics["Hollow Street"].startswith("Hollow")
    assert list(generics) == ["Vell", "Mira Vell", "Mira", "Hollow Street"]
    assert generics != choose_generics([*terms, Term("Hollow Street", "place", 2)], [STORY], seed=2)


def test_pools_go_on_in_pairs() -> None:
    terms = [Term(f"X{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}", "person", 1) for i in range(100)]
    generics = choose_generics(terms, [STORY], seed=0)
    assert len(set(generics.values())) == 100
    paired = sum("-" in generic for generic in generics.values())
    assert 0 < paired < 50  # only when the single names that begin with a consonant are used up


def test_no_two_pools_have_a_word_in_common() -> None:
    words = Counter(word.lower() for pool in POOLS.values() for word in pool)
    assert set(words.values()) == {1}


def test_a_proposed_dictionary_translates_the_story() -> None:
    proposals = propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, seed=3)
    anchors = Anchors({proposal.anchor: proposal.generic for proposal in proposals})
    translated = translate(STORY, anchors).target
    assert not {"mira", "vell", "vells", "ostrel", "toras"} & words_of([translated])
    assert proposals == propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, seed=3)
    assert propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, limit=2)[0].count == 3
    with pytest.raises(InputError, match="no expression is peculiar.*`background`"):
        propose_by_contrast([STORY], [STORY])
