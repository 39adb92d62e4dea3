"""Generic counterparts: consistent, new, and from pools that have no word in common."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.methods.whp.story import STORY
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.generics import POOLS, choose_generics
from unlearning.methods.whp.terms import Term, words_of

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
