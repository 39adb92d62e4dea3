"""Terms that are peculiar to a text: which are found, and what each is taken for."""

from collections import Counter

import pytest

from tests.unlearning.methods.whp.story import BACKGROUND, STORY
from unlearning.common.errors import InputError
from unlearning.methods.whp.terms import Kind, rare_terms


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
